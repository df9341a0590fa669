"""From what the user typed after `--model` to a directory on this machine.

`demo` is the model inside the package; a path names a directory; anything shaped like a Hub id is fetched through
huggingface_hub, which is optional and honours HF_HUB_OFFLINE, HF_TOKEN and its cache by itself. Only the files a server
reads are fetched.
"""

from __future__ import annotations

import re
from pathlib import Path

from hma_serve.checkpoint.random_checkpoint import PREFIX, random_checkpoint, random_name
from hma_serve.core.errors import FailedPrecondition, NotFound

DEMO = "demo"
_FLAG = "model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_FETCHED = ["*.json", "*.safetensors", "*.jinja"]


def resolve_checkpoint(model: str) -> Path:
    """Finds the checkpoint directory, downloading it if the name is a Hub id that is not cached yet.

    Args:
        model: `demo`, a directory, a Hub id such as `Qwen/Qwen3-8B`, or `random:` and a shape. A directory wins over a
            Hub id of that name.

    Returns:
        A directory that contains config.json.

    Raises:
        NotFound: No such directory, Hub id or config.json.
        FailedPrecondition: The name is a Hub id and huggingface_hub is not installed.
    """
    if model == DEMO:
        return Path(__file__).parent / DEMO
    if model.startswith(PREFIX):
        return random_checkpoint(model.removeprefix(PREFIX))
    directory = Path(model).expanduser()
    if not directory.is_dir():
        if not _HUB_ID.fullmatch(model) or directory.exists():
            raise NotFound(f"no checkpoint directory at {model!r}", field=_FLAG)
        directory = _fetch(model)
    if not (directory / "config.json").is_file():
        raise NotFound(f"{directory} is not a checkpoint: it has no config.json", field=_FLAG)
    return directory


def model_name(model: str) -> str:
    """The name under which a model is served: a directory's last component, otherwise as it was asked for."""
    if model.startswith(PREFIX):
        return random_name(model.removeprefix(PREFIX))
    path = Path(model).expanduser()
    return path.resolve().name if model != DEMO and path.is_dir() else model


def _fetch(hub_id: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise FailedPrecondition(
            f"there is no directory {hub_id!r}; to fetch it from the Hub, install huggingface_hub (extra `hub`)",
            field=_FLAG,
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_FETCHED))
    # Every failure of the client (HTTP, offline mode without a cached copy, a malformed id) is one of these two.
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotFound(
            f"there is no directory {hub_id!r} and the Hub did not provide it: {reason}", field=_FLAG
        ) from error
