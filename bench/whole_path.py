"""The whole path on one machine: prefill, gRPC between processes, packed decode. A program of its own.

`python -m bench.whole_path --prefill "--device cuda --profile NAME" --decode "--device cuda" --model qwen3-8b` on a GPU
machine, or without arguments with the demo model on CPUs. Prints TTFT, what of it is computation and what the transfer
left exposed, bytes, and TPOT, one request at a time; writes `whole_path.json` into $OUT or the current directory.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import shlex
from pathlib import Path

from bench.figures import Figure, figure, provenance, show
from bench.split_pair import Pair, connected, worker

REPEATS = 5
NEW_TOKENS = 64


async def _prompt(pair: Pair, tokens: int) -> list[Figure]:
    """Figures of one length of prompts."""
    await pair.run(tokens, NEW_TOKENS)
    passed = [await pair.run(tokens, NEW_TOKENS) for _ in range(REPEATS)]
    name = f"{tokens} tokens"
    return [
        figure(f"{name}: TTFT", [each.ttft * 1e3 for each in passed], "ms"),
        figure(f"{name}: prefill's computation", [each.compute * 1e3 for each in passed], "ms"),
        figure(f"{name}: exposed transfer", [each.exposed * 1e3 for each in passed], "ms"),
        figure(f"{name}: KV", [each.payload_bytes / 1e6 for each in passed], "MB"),
        figure(f"{name}: TPOT", [each.tpot * 1e3 for each in passed], "ms"),
    ]


async def _measure(prefill: list[str], decode: list[str], prompts: list[int]) -> list[Figure]:
    rows: list[Figure] = []
    with worker("prefill", *prefill) as left, worker("decode", *decode) as right:
        async with connected(left, right) as pair:
            for tokens in prompts:
                rows += await _prompt(pair, tokens)
    return rows


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.whole_path", description=__doc__)
    parser.add_argument("--model", metavar="SHAPE", help="random weights of this shape; default: the demo model")
    parser.add_argument("--prefill", default="", metavar="FLAGS", help="of hma-serve prefill")
    parser.add_argument("--decode", default="", metavar="FLAGS", help="of hma-serve decode")
    parser.add_argument("--prompts", default="1024,3072", metavar="TOKENS,...", help="multiples of 32")
    args = parser.parse_args()
    model = ["--random-weights", args.model] if args.model else ["--model", "demo"]
    prompts = [int(tokens) for tokens in args.prompts.split(",")]
    rows = asyncio.run(_measure([*model, *shlex.split(args.prefill)], [*model, *shlex.split(args.decode)], prompts))
    found = {
        "provenance": provenance(),
        "arguments": vars(args),
        "figures": [dataclasses.asdict(row) for row in rows],
    }
    (Path(os.environ.get("OUT", ".")) / "whole_path.json").write_text(json.dumps(found, indent=1))
    print(found["provenance"])
    show("prefill, gRPC, packed decode; one request at a time", rows)


if __name__ == "__main__":
    main()
