"""What the native wire, overlap and fused decoding are each worth: every combination over one limited link.

Real prefill and decode workers, one request at a time, in a profile's arithmetic; the link's rate is such that the BF16
transfer takes `--transfer` times the computation, unless `--mbit` says what it is. On a GPU machine:
`python -m bench.ablation --device cuda --decode-device cuda --profile fp8_e4m3 --tokens 4096 --mbit 10000
--model random:qwen3-4b random:qwen3-8b random:qwen3-14b random:qwen3-32b`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.ablation_layer import layer_times
from bench.ablation_page import Ablation, Row, tables, write
from bench.figures import provenance
from bench.split_pair import Pair, Passage, Worker, connected, started_together, worker
from hma_serve.checkpoint import read_model_config, resolve_checkpoint
from hma_serve.prefill.profiles import find_profile

MODES = ("fused", "materialise")
REPEATS = 3
_POOL = re.compile(r"KV for (\d+) tokens in ([\d.]+) MiB")
_BF16_WIRE = """\
name = "{name}"
weights = "{weights}"
activations = "{activations}"
compute = "{compute}"
kv = {{ k = "bf16", v = "bf16" }}
"""


@dataclass
class Setting:
    """What is measured.

    Attributes:
        model: Name, directory or `random:SHAPE`.
        device: Of prefill.
        decode_device: Of decode.
        profile: Of the arithmetic.
        tokens: Of the prompt, one chunk.
        transfer: BF16 transfer in units of the computation.
        mbit: Rate of the link; None: from `transfer`.
        profiles: Directory for the profile with the BF16 wire.
    """

    model: str
    device: str
    decode_device: str
    profile: str
    tokens: int
    transfer: float
    mbit: float | None
    profiles: Path

    def wires(self) -> dict[str, str]:
        """Profiles by what they send; writes the one that sends BF16."""
        profile = find_profile(self.profile)
        name = f"{self.profile}_bf16_wire"
        text = _BF16_WIRE.format(
            name=name, weights=profile.weights, activations=profile.activations, compute=profile.compute
        )
        (self.profiles / f"{name}.toml").write_text(text, encoding="utf-8")
        return {"bf16": name, profile.k_codec: self.profile}

    def decode(self, mode: str) -> list[str]:
        """Arguments of a decode worker; it leaves a device that it shares with prefill what prefill needs."""
        native, longest = find_profile(self.profile), self.tokens + 64
        arguments = ["--model", self.model, "--device", self.decode_device, "--kv-mode", mode, "--threads", "1"]
        arguments += ["--codecs", f"{native.k_codec},{native.v_codec}", "--max-model-len", str(longest)]
        arguments += ["--kv-capacity-tokens", str(4 * longest), "--max-running", "4"]
        return [*arguments, "--kv-lease", "300", "--stall-timeout", "300"]

    @contextlib.contextmanager
    def prefill(self, profile: str, *, overlap: bool) -> Iterator[Worker]:
        """A worker."""
        arguments = ["--model", self.model, "--device", self.device, "--profile", profile]
        arguments += ["--profiles", str(self.profiles), "--chunk-tokens", str(self.tokens)]
        arguments += ["--prefix-cache-bytes", "0", "--threads", "1", "--overlap", "on" if overlap else "off"]
        arguments += ["--max-running", "2", "--max-model-len", str(self.tokens + 64), "--stall-timeout", "300"]
        with worker("prefill", *arguments) as made:
            yield made


async def _passages(pair: Pair, tokens: int) -> tuple[list[Passage], int]:
    await pair.run(tokens)
    return [await pair.run(tokens) for _ in range(REPEATS)], await pair.held_tokens(tokens)


async def _row(
    setting: Setting, wire: str, prefill: Worker, decode: Worker, *, overlap: bool, mode: str, rate: float
) -> Row:
    async with connected(prefill, decode) as pair:
        pair.link.limit(rate)
        passages, held = await _passages(pair, setting.tokens)
    found = _POOL.search(decode.said)
    assert found is not None
    plain_bytes = float(found[2]) * 2**20 / int(found[1])
    return Row(
        wire=wire,
        overlap=overlap,
        mode=mode,
        ttft=statistics.median(one.ttft for one in passages),
        compute=statistics.median(one.compute for one in passages),
        exposed=statistics.median(one.exposed for one in passages),
        payload_bytes=passages[0].payload_bytes,
        held_bytes=held * plain_bytes,
    )


async def _rate(setting: Setting, prefill: Worker, decode: Worker) -> float:
    """Bytes per second of the link, from what BF16 takes."""
    if setting.mbit is not None:
        return setting.mbit * 1e6 / 8
    async with connected(prefill, decode) as pair:
        (*_, last), _ = await _passages(pair, setting.tokens)
    return last.payload_bytes / (setting.transfer * last.compute)


def measure(setting: Setting) -> Ablation:
    """All combinations of one model."""
    wires, rows, rate = setting.wires(), [], 0.0
    model = read_model_config(resolve_checkpoint(setting.model))
    for mode in MODES:
        with worker("decode", *setting.decode(mode)) as decode:
            for wire, profile in wires.items():
                makers = [setting.prefill(profile, overlap=overlap) for overlap in (True, False)]
                with started_together(makers) as prefills:
                    rate = rate or asyncio.run(_rate(setting, prefills[0], decode))
                    for overlap, prefill in zip((True, False), prefills, strict=True):
                        row = _row(setting, wire, prefill, decode, overlap=overlap, mode=mode, rate=rate)
                        rows.append(asyncio.run(row))
                        print(rows[-1], file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (list(wires).index(row.wire), not row.overlap, MODES.index(row.mode)))
    native = find_profile(setting.profile)
    codecs = {"bf16": ("bf16", "bf16"), native.k_codec: (native.k_codec, native.v_codec)}
    devices = (setting.device, setting.decode_device)
    times = {wire: layer_times(model, names, setting.tokens, devices) for wire, names in codecs.items()}
    name = setting.model.removeprefix("random:")
    return Ablation(name, setting.profile, setting.device, setting.tokens, model.num_layers, rate, rows, times)


def main() -> None:
    """Measures, prints, and writes the page if told where."""
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["demo"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--decode-device", default="cpu")
    parser.add_argument("--profile", default="tt_bfp8")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--transfer", type=float, default=1.0, help="BF16 transfer over computation")
    parser.add_argument("--mbit", type=float, help="rate of the link, instead")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="write ablation.md and ablation.svg there, after each model"
    )
    args = parser.parse_args()
    made, results = provenance(), []
    print(made)
    with tempfile.TemporaryDirectory() as profiles:
        for model in args.model:
            setting = Setting(
                model,
                args.device,
                args.decode_device,
                args.profile,
                args.tokens,
                args.transfer,
                args.mbit,
                Path(profiles),
            )
            results.append(measure(setting))
            print(f"\n{results[-1].title}\n\n{tables(results[-1])}", flush=True)
            if args.write is not None:
                args.write.mkdir(parents=True, exist_ok=True)
                write(results, f"`python -m bench.ablation {' '.join(sys.argv[1:])}`: {made}", args.write)


if __name__ == "__main__":
    main()
