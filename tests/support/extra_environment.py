"""An environment that holds one extra's packages and nothing else, as an image does.

Built from what is installed here, by links: the packages that the extra asks for, and those that they ask for.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("common", "services/router", "services/prefill", "services/decode", "tools")


def packages_of(extra: str) -> set[str]:
    """Canonical names of every distribution that `hma-serve[extra]` brings, itself not included."""
    found: set[str] = set()
    asked = [Requirement(f"hma-serve[{extra}]")]
    visited: set[tuple[str, frozenset[str]]] = set()
    while asked:
        requirement = asked.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in visited:
            continue
        visited.add((name, frozenset(requirement.extras)))
        found.add(name)
        for line in distribution(name).requires or ():
            needed = Requirement(line)
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": one}) for one in requirement.extras or {""}):
                asked.append(needed)
    return found - {"hma-serve"}


def make_environment(directory: Path, extra: str) -> Path:
    """Makes a virtual environment in `directory`; returns its `hma-serve` command."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = directory / "lib" / version / "site-packages"
    for name in sorted(packages_of(extra)):
        _link(name, site)
    metadata = site / "hma_serve-0.dist-info"
    metadata.mkdir()
    for file in ("METADATA", "entry_points.txt"):
        text = distribution("hma-serve").read_text(file)
        if text:
            (metadata / file).write_text(text)
    (site / "sources.pth").write_text("".join(f"{ROOT / source}\n" for source in SOURCES))
    command = directory / "bin" / "hma-serve"
    start = "import sys; from hma_serve.cli.main import main; sys.exit(main())"
    command.write_text(f"#!/bin/sh\nexec {directory}/bin/python -c '{start}' \"$@\"\n")
    command.chmod(0o755)
    return command


def _link(name: str, site: Path) -> None:
    try:
        installed = distribution(name)
    except PackageNotFoundError as exc:
        raise AssertionError(f"{name} is needed and not installed") from exc
    for file in installed.files or ():
        if file.parts[0] == ".." or file.suffix == ".pyc":
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(Path(str(installed.locate_file(file))))
