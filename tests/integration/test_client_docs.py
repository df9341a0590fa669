"""Every Python example of docs/sdk.md, run as a program of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cluster import environment
from support.fake_inference import FakeRouter

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sdk.md"
EXAMPLES = re.findall(r"^## (.+?)$|```python\n(.*?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def examples() -> list[tuple[str, str]]:
    """Each example under the heading before it."""
    found, heading = [], ""
    for title, code in EXAMPLES:
        heading = title or heading
        if code:
            found.append((heading, code))
    return found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A router's gRPC address; any that serves a model will do."""
    with FakeRouter() as router:
        yield router.address


@pytest.mark.parametrize(
    "code", [code for _, code in examples()], ids=[f"{heading}-{n}" for n, (heading, _) in enumerate(examples())]
)
def test_the_example_runs(code: str, address: str) -> None:
    assert "localhost:50051" in code
    program = code.replace("localhost:50051", address)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env=environment(), check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert result.stderr == ""


def test_the_page_has_examples_for_both_clients() -> None:
    code = "".join(code for _, code in examples())
    assert "AsyncClient(" in code
    assert "client.chat(" in code
