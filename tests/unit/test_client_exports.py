"""The SDK's surface: what it exports, and what it needs to be imported."""

import subprocess
import sys

import hma_serve.client

EXPORTS = [
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Choice",
    "Client",
    "Completion",
    "ContextLengthExceeded",
    "DataLoss",
    "DeadlineExceeded",
    "Delta",
    "FailedPrecondition",
    "FinishReason",
    "HmaError",
    "Internal",
    "InvalidArgument",
    "Message",
    "Model",
    "NotFound",
    "Options",
    "PayloadTooLarge",
    "PermissionDenied",
    "ResourceExhausted",
    "RetryPolicy",
    "Slo",
    "Stream",
    "Structure",
    "StructureKind",
    "Tls",
    "TokenAlternative",
    "TokenLogprobs",
    "Unauthenticated",
    "Unavailable",
    "Usage",
]

# typing_extensions is grpcio's own requirement.
IMPORT_WITH_THE_BASE_INSTALL_ALONE = """
import sys
allowed = {"grpc", "google.protobuf", "typing_extensions", "hma_serve.client", "hma_serve.core", "hma_serve.v1"}

class Gate:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in allowed or name in ("google", "hma_serve"):
            return None
        if ".".join(name.split(".")[:2]) in allowed:
            return None
        raise ModuleNotFoundError(f"{name} is not part of the base install", name=name)

sys.meta_path.insert(0, Gate())
import hma_serve.client
print(sorted(name for name in sys.modules if name.startswith("hma_serve.") and name.count(".") == 1))
"""


def test_the_exports_are_pinned() -> None:
    assert sorted(hma_serve.client.__all__) == EXPORTS
    public = {name for name in vars(hma_serve.client) if not name.startswith("_")}
    assert public == set(EXPORTS)


def test_everything_exported_is_documented() -> None:
    undocumented = [name for name in EXPORTS if name != "FinishReason" and not getattr(hma_serve.client, name).__doc__]
    assert undocumented == []


def test_importing_needs_the_base_install_alone() -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_WITH_THE_BASE_INSTALL_ALONE], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['hma_serve.client', 'hma_serve.core', 'hma_serve.v1']"


def test_both_clients_have_the_same_surface() -> None:
    def surface(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert surface(hma_serve.client.Client) == surface(hma_serve.client.AsyncClient)
    assert surface(hma_serve.client.Stream) == surface(hma_serve.client.AsyncStream)
