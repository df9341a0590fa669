"""Regenerates (or checks) the protobuf and gRPC stubs that are kept in the repository.

Stubs are checked in so that an install needs no compiler and a change of the schema shows up in review. `--check`
generates into a scratch directory and fails on any difference, which is what `make verify` runs.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
OUTPUT = ROOT / "common"
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(output: Path) -> None:
    """Writes the stubs of every schema below `output`; exits on a compiler error."""
    sources = sorted(PROTOS.rglob("*.proto"))
    with_services = [path for path in sources if "\nservice " in path.read_text()]
    include = [f"-I{PROTOS}", f"-I{files('grpc_tools') / '_proto'}"]
    messages = [f"--python_out={output}", f"--mypy_out={output}"]
    services = [f"--grpc_python_out={output}", f"--mypy_grpc_out={output}"]
    for flags, inputs in ((messages, sources), (services, with_services)):
        if inputs and protoc.main(["protoc", *include, *flags, *map(str, inputs)]) != 0:
            sys.exit("protoc failed; see the messages above")
    for directory in {path.parent for pattern in PATTERNS for path in output.rglob(pattern)}:
        (directory / "__init__.py").write_text('"""Generated from protos/ by `make proto`."""\n')


def stubs(root: Path) -> set[Path]:
    """Stub files below `root`, relative to it."""
    return {path.relative_to(root) for pattern in PATTERNS for path in root.rglob(pattern)}


def check() -> int:
    """Compares freshly generated stubs with the ones in the repository; returns an exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        generate(fresh)
        expected, present = stubs(fresh), stubs(OUTPUT)
        wrong = {p for p in expected & present if not filecmp.cmp(fresh / p, OUTPUT / p, shallow=False)}
        for path in sorted(wrong | (expected ^ present)):
            print(f"stub out of date: common/{path} (run `make proto`)")
        return 1 if wrong or expected != present else 0


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    if parser.parse_args().check:
        return check()
    for path in stubs(OUTPUT):
        (OUTPUT / path).unlink()
    generate(OUTPUT)
    shutil.rmtree(OUTPUT / "__pycache__", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
