"""The repository's own rules, run as a contributor runs them: style, imports, schemas, generated files, types."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def run(*command: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        environment = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": home}
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "--no-cache", "."),
        ("ruff", "format", "--no-cache", "--check", "."),
        ("lint-imports", "--no-cache"),
        ("buf", "lint"),
        ("python", "tools/generate_stubs.py", "--check"),
    ],
    ids=["ruff", "format", "imports", "buf", "stubs"],
)
def test_the_tree_is_clean(command: tuple[str, ...]) -> None:
    run(str(BIN / command[0]), *command[1:])


@pytest.mark.timeout(600)
def test_types_hold() -> None:
    run(str(BIN / "mypy"))


def test_the_namespace_stays_open() -> None:
    """Another distribution may add its own `hma_serve.something`; an __init__.py at the top would forbid it."""
    assert not list(ROOT.glob("**/hma_serve/__init__.py"))


def test_the_make_targets_explain_themselves() -> None:
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("help", "setup", "up", "test", "lint", "type", "verify", "fix", "proto", "bench"):
        assert re.search(rf"\033\[1m{target} *\033\[0m", result.stdout)
