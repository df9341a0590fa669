"""The base install, in an empty environment: nothing but grpcio, protobuf and numpy, and the SDK works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_inference import FakeRouter

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = """
import asyncio, sys
from hma_serve.client import AsyncClient, Client

address = sys.argv[1]
with Client(address) as client:
    print(client.generate("Hello", max_tokens=2).result().text)

async def main():
    async with AsyncClient(address) as client:
        print((await client.chat([{"role": "user", "content": "Hello"}]).result()).text)

asyncio.run(main())
"""
# typing_extensions comes with grpcio.
EXPECTED = {"hma-serve", "grpcio", "protobuf", "numpy", "typing_extensions"}


@pytest.mark.timeout(300)
def test_the_sdk_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    wheel = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(wheel, cwd=ROOT, check=True, capture_output=True)
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    install = ["install", "--quiet", "--no-compile", *constraints, *map(str, tmp_path.glob("*.whl"))]
    subprocess.run([*pip, *install], check=True, env=env)

    listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True, env=env)
    assert {line.partition("==")[0] for line in listed.stdout.split()} == EXPECTED

    with FakeRouter() as router:
        result = subprocess.run(
            [python, "-W", "error", "-c", EXAMPLE, router.address],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stdout) == (0, " word0 word1\n1: Hello\n"), result.stderr
        command: list[str | Path] = [
            tmp_path / "venv" / "bin" / "hma-serve",
            "complete",
            "--address",
            router.address,
            "--max-tokens=1",
            "x",
        ]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (0, " word0\n"), result.stderr
