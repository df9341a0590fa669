"""Writes docs/top.svg: what `hma-serve top` shows of a running cluster under load, as it was printed.

Run as `python -m bench.top_picture`. The cluster is a whole one on this machine; nothing in the picture is made up.
"""

from __future__ import annotations

import concurrent.futures
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from html import escape
from pathlib import Path

from bench.figures import provenance
from hma_serve.cli.up import free_port

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "top.svg"
PROMPT = "The whale rose from the sea and the captain cried out to his men. "
STREAMS = 8
SECONDS = 12.0

_PROGRAM = (sys.executable, "-m", "hma_serve.cli.main")
_CELL, _LINE, _MARGIN = 7.83, 19, 18


def keep_asking(port: int, number: int, until: float) -> None:
    """One client after another, until the time is over."""
    turn = 0
    while time.monotonic() < until:
        turn += 1
        body = {"prompt": f"{number}/{turn} {PROMPT * 20}", "max_tokens": 64, "temperature": 0.8, "seed": turn}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=60).read()


def look() -> str:
    """Starts a cluster, keeps it busy and returns one look at it."""
    port = free_port("127.0.0.1")
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--http-port", str(port), "--grpc-port", "0", "--decode", "2", "--data-dir", directory]
        choices = ["--prefill-arg=--price-per-hour=0.15", "--decode-arg=--price-per-hour=3"]
        choices.append("--decode-arg=--kv-capacity-tokens=16384")
        # The demo model is so small that decode would compute every prompt itself.
        choices.append("--router-arg=--local-prefill-tokens=0")
        process = subprocess.Popen([*_PROGRAM, "up", *flags, *choices], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("serving"):
                    break
            etcd = next(line.split()[-1] for line in lines if line.split()[:1] == ["etcd"])
            until = time.monotonic() + SECONDS
            with concurrent.futures.ThreadPoolExecutor(STREAMS) as clients:
                for number in range(STREAMS):
                    clients.submit(keep_asking, port, number, until)
                time.sleep(SECONDS / 3)
                asked = [*_PROGRAM, "top", "--etcd", etcd, "--once", "--interval", f"{SECONDS / 3:g}"]
                return subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        finally:
            process.terminate()
            process.communicate()


def svg(text: str, source: str) -> str:
    """The text as a terminal would show it."""
    lines = ["$ hma-serve top", *text.rstrip("\n").split("\n")]
    width = max(map(len, lines)) * _CELL + 2 * _MARGIN
    height = len(lines) * _LINE + 2 * _MARGIN
    heading = re.compile(r"(hma-serve|router|prefill|decode)\s{2,}")
    rows = []
    for number, line in enumerate(lines):
        bold = ' font-weight="bold" fill="#ffffff"' if heading.match(line) else ""
        baseline = _MARGIN + (number + 0.75) * _LINE
        rows.append(f'<text x="{_MARGIN}" y="{baseline:.0f}" xml:space="preserve"{bold}>{escape(line)}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="13" fill="#c9d1d9">'
    )
    frame = f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#0d1117"/>'
    return "\n".join([head, f"<!-- {escape(source)} -->", frame, *rows, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(svg(look(), provenance()))
    print(PICTURE.read_text())
