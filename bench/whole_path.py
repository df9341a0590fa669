"""The whole path on one machine: prefill, gRPC between processes, packed decode; then how fast decode takes KV in.

`python -m bench.whole_path --device cuda` on a GPU machine: Qwen3-8B's shape with random weights, prefill in FP8 on the
GPU and in INT8 on the host's cores, decode on the GPU. Without arguments the demo model on CPUs, so that the same
program runs anywhere. One request at a time for TTFT and TPOT; for ingest a batch decodes while 1, 2, 4 and 8 receivers
take in KV (`bench/ingest.py`). Prints its tables and writes `whole_path.json`, `.md` and `.svg` into $OUT or the
current directory, after each part what it has so far. `--seconds` ends it early rather than late.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.ablation_layer import layer_times
from bench.figures import provenance
from bench.ingest import STREAMS, Load, measure
from bench.split_pair import Worker, connected, started_together, worker
from bench.whole_path_page import LayerParts, PathRow, Result, picture, tables
from hma_serve.checkpoint import read_model_config, resolve_checkpoint
from hma_serve.prefill.profiles import find_profile

NEW_TOKENS = 64


@dataclass(frozen=True)
class Prefill:
    """One prefill worker.

    Attributes:
        profile: Its arithmetic.
        device: Its device.
        prompts: Tokens of each length that it is measured with.
        repeats: Of each.
    """

    profile: str
    device: str
    prompts: Sequence[int]
    repeats: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.profile} on {self.device}"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        model: Name, directory or `random:SHAPE`.
        device: Of decode.
        prefills: In turn.
        receivers: Numbers of them.
        load: For ingest.
        threads: Of a prefill worker on the CPU.
        kv_capacity_tokens: Of decode.
    """

    model: str
    device: str
    prefills: Sequence[Prefill]
    receivers: Sequence[int]
    load: Load
    threads: int
    kv_capacity_tokens: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Plan:
        """What the command line says, and for the rest what fits the device."""
        gpu = args.device == "cuda"
        model = args.model or ("random:qwen3-8b" if gpu else "demo")
        prompts = args.prompts or ([1024, 4096] if gpu else [512, 1024])
        prefills = [
            Prefill("fp8_e4m3" if gpu else "tt_bfp8", args.device, prompts, 5 if gpu else 3),
            # A few seconds a prompt of an 8B model: the shortest alone.
            Prefill("int8", "cpu", prompts[:1], 1 if gpu else 3),
        ]
        load = Load(
            model=model,
            codec=find_profile(prefills[0].profile).k_codec,
            batch=args.batch or (8 if gpu else 2),
            context=args.context or (1024 if gpu else 256),
            steps=args.steps or (200 if gpu else 30),
            window=min(read_model_config(resolve_checkpoint(model)).max_position_embeddings, 8192),
            pushed=2048,
        )
        capacity = load.batch * load.window + 2 * (STREAMS * max(args.receivers) * load.pushed + load.window)
        cores = len(os.sched_getaffinity(0))
        return cls(model, args.device, prefills, args.receivers, load, max(1, cores - 4), capacity)

    def prefill(self, one: Prefill, events: Path) -> list[str]:
        """Arguments of a prefill worker."""
        longest = max(one.prompts)
        arguments = ["--model", self.model, "--device", one.device, "--profile", one.profile, "--events", str(events)]
        arguments += ["--chunk-tokens", str(longest), "--max-model-len", str(longest + 32), "--max-running", "2"]
        return [*arguments, "--prefix-cache-bytes", "0", "--threads", str(self.threads), "--stall-timeout", "300"]

    def decode(self) -> list[str]:
        """Arguments of the decode worker."""
        codecs = {codec for one in self.prefills for codec in _codecs(one.profile)}
        arguments = ["--model", self.model, "--device", self.device, "--codecs", ",".join(sorted(codecs - {"bf16"}))]
        arguments += ["--max-model-len", str(self.load.window), "--kv-capacity-tokens", str(self.kv_capacity_tokens)]
        arguments += ["--receivers", str(max(self.receivers)), "--kv-lease", "600", "--stall-timeout", "300"]
        return [*arguments, "--threads", "1"]


def _codecs(profile: str) -> tuple[str, str]:
    found = find_profile(profile)
    return found.k_codec, found.v_codec


async def _path(one: Prefill, prefill: Worker, decode: Worker, events: Path, layers: int) -> list[PathRow]:
    rows = []
    async with connected(prefill, decode, link=False) as pair:
        for tokens in one.prompts:
            await pair.run(tokens, NEW_TOKENS)
            passed = [await pair.run(tokens, NEW_TOKENS) for _ in range(one.repeats)]
            row = PathRow(
                prefill=one.name,
                tokens=tokens,
                ttft=statistics.median(each.ttft for each in passed),
                compute=statistics.median(each.compute for each in passed),
                exposed=statistics.median(each.exposed for each in passed),
                tpot=statistics.median(each.tpot for each in passed),
                payload_bytes=passed[0].payload_bytes,
                layer=LayerParts(
                    compute=statistics.median(each.compute for each in passed) / layers,
                    transfer=transfer_seconds(events, layers, one.repeats),
                ),
            )
            rows.append(row)
    return rows


def transfer_seconds(events: Path, layers: int, prompts: int) -> float:
    """That a layer took to leave once it was computed and the one before had left: the median over the last prompts."""
    lines = [json.loads(line) for line in events.read_text().splitlines()[-layers * prompts :]]
    spent: list[int] = []
    for start in range(0, layers * prompts, layers):
        left = 0
        for line in lines[start : start + layers]:
            spent.append(line["left_ns"] - max(line["computed_ns"], left))
            left = line["left_ns"]
    return statistics.median(spent) / 1e9


def _with_layer(row: PathRow, one: Prefill, plan: Plan) -> PathRow:
    """Adds what packing and unpacking take, which the services do inside of other things."""
    model = read_model_config(resolve_checkpoint(plan.model))
    threads = plan.threads if one.device == "cpu" else 1
    times = layer_times(model, _codecs(one.profile), row.tokens, (one.device, plan.device), threads)
    return dataclasses.replace(row, layer=dataclasses.replace(row.layer, pack=times.pack, unpack=times.fused))


async def _ingest(plan: Plan, decode: Worker, end: float, result: Result) -> None:
    async for row in measure(plan.load, decode.address, plan.receivers, end - time.monotonic()):
        result.ingest.append(row)
        _write(result)
        _say(f"{row}")


def run(plan: Plan, end: float, result: Result) -> None:
    """Measures, and writes after each part."""
    layers = read_model_config(resolve_checkpoint(plan.model)).num_layers
    _say("workers start")
    with tempfile.TemporaryDirectory() as directory:
        events = [Path(directory) / f"{number}.jsonl" for number in range(len(plan.prefills))]
        makers = [worker("prefill", *plan.prefill(one, file)) for one, file in zip(plan.prefills, events, strict=True)]
        with started_together([worker("decode", *plan.decode()), *makers]) as (decode, *prefills):
            for one, prefill, file in zip(plan.prefills, prefills, events, strict=True):
                _say(f"{one.name}: {list(one.prompts)} tokens")
                result.paths += asyncio.run(_path(one, prefill, decode, file, layers))
                _write(result)
            _say("a layer's packing and unpacking")
            by_name = {one.name: one for one in plan.prefills}
            result.paths = [_with_layer(row, by_name[row.prefill], plan) for row in result.paths]
            _write(result)
            _say("ingest")
            asyncio.run(_ingest(plan, decode, end, result))


def _write(result: Result) -> None:
    out = Path(os.environ.get("OUT", "."))
    (out / "whole_path.json").write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    (out / "whole_path.md").write_text(tables(result))
    (out / "whole_path.svg").write_text(picture(result))


def _say(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main() -> None:
    """Entry point."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.whole_path", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of decode and of the first prefill")
    parser.add_argument("--model", help="name, directory or random:SHAPE; default: random:qwen3-8b on a GPU, else demo")
    parser.add_argument("--prompts", type=_numbers, metavar="TOKENS,...", help="multiples of 32")
    parser.add_argument("--receivers", type=_numbers, default=[1, 2, 4, 8], metavar="N,...")
    parser.add_argument("--batch", type=int, help="requests that decode while KV arrives")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="of each of these; a multiple of 32")
    parser.add_argument("--steps", type=int, help="tokens of each that are timed at a time")
    parser.add_argument("--seconds", type=float, default=450, help="begin no new measurement of ingest after so many")
    args = parser.parse_args()
    plan = Plan.of(args)
    result = Result(provenance(), f"{plan.model}, decode on {plan.device}", plan.load)
    try:
        run(plan, began + args.seconds, result)
    finally:
        print(tables(result))


if __name__ == "__main__":
    main()
