"""K offsets through the real services: calibrated by the command, subtracted by prefill, given back by decode.

In fp32 with the f32 codec nothing is lost, so greedy tokens with offsets equal those without. Workers with unlike
tables are not paired, and a stream that brings another table is refused by its name.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from hma_serve.checkpoint import fingerprint, read_model_config, resolve_checkpoint
from hma_serve.core.errors import FailedPrecondition
from hma_serve.kvblock import OffsetTable, decode_frame, encode_frame
from hma_serve.prefill import config as prefill_config
from hma_serve.prefill.served_model import read_served_model
from support.cluster import Cluster, command, environment, running_cluster
from support.decode_worker import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    connected,
    first,
    make_checkpoint,
    prompt,
    refusal,
    refused_push,
    running_worker,
)
from support.reference import reference_generate

TEXT = Path(__file__).parents[1] / "golden" / "text" / "sample.txt"
NEW_TOKENS = 12


def calibrate(profile: str, output: Path) -> str:
    arguments = ["--model", "demo", "--profile", profile, "--text", str(TEXT), "-o", str(output)]
    done = subprocess.run(
        command("kv", "calibrate", *arguments, "--tokens", "256", "--prompts", "2", "--threads", "1"),
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    return done.stdout


def demo_prompts() -> list[list[int]]:
    draw = np.random.default_rng(5)
    vocab = read_model_config(resolve_checkpoint("demo")).vocab_size
    return [draw.integers(0, vocab, length).tolist() for length in (33, 64, 65, 200, 411)]


def complete(cluster: Cluster, ids: list[int]) -> list[int]:
    body = {"prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


@pytest.mark.parametrize("mode", ["fused", "materialise"])
def test_greedy_tokens_with_offsets_equal_those_without(tmp_path: Path, mode: str) -> None:
    table = tmp_path / "offsets"
    said = calibrate("f32", table)
    assert re.search(r"^hash [0-9a-f]{64}$", said, re.MULTILINE)
    checkpoint = resolve_checkpoint("demo")
    arguments = ["--prefill-profile", "f32", "--dtype", "float32", f"--decode-arg=--kv-mode={mode}"]
    arguments += [f"--{role}-arg=--k-offsets={table}" for role in ("prefill", "decode")]
    prompts = demo_prompts()
    with running_cluster(tmp_path / "cluster", *arguments) as cluster:
        assert [complete(cluster, ids) for ids in prompts] == [
            reference_generate(checkpoint, "f32", ids, NEW_TOKENS) for ids in prompts
        ]
        # The keys really came from prefill, without what decode gave back.
        assert cluster.metric("prefill", "tokens_total") == sum((len(ids) - 1) // 32 * 32 for ids in prompts)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def a_table(value: float) -> OffsetTable:
    return OffsetTable({(layer, 0): np.full(HEAD_DIM, value, np.float32) for layer in range(LAYERS)})


def bringing(table: OffsetTable) -> Callable[[list[bytes]], list[bytes]]:
    """Puts another table into the open frame."""

    def change(frames: list[bytes]) -> list[bytes]:
        header, _ = decode_frame(frames[0])
        header.open.manifest.k_offsets.extend(table.to_proto())
        return [encode_frame(header), *frames[1:]]

    return change


async def test_decode_refuses_offers_and_streams_with_other_offsets_by_name(checkpoint: Path, tmp_path: Path) -> None:
    own, model = a_table(1.0), fingerprint(checkpoint)
    file = tmp_path / "offsets"
    file.write_bytes(own.to_bytes(model_fingerprint=model, profile="f32"))
    tokens = prompt(70)
    with running_worker(checkpoint, "--k-offsets", str(file)) as worker:
        async with connected(worker, checkpoint) as client:
            request = client.request(tokens, 64)
            without = await refusal(client.decode.Generate(request, timeout=60).read())
            assert (type(without), without.field) == (FailedPrecondition, "k_offsets")
            request.offer.k_offsets = True
            other = await refusal(client.decode.Generate(request, timeout=60).read())
            assert (type(other), other.field) == (FailedPrecondition, "model_fingerprint")
            request.offer.model_fingerprint = own.fingerprint(model)
            call = client.decode.Generate(request, timeout=60)
            ticket = (await first(call)).ticket
            for table in (OffsetTable({}), a_table(2.0)):
                refused = await refused_push(client.push(tokens[:64], ticket, change=bringing(table)))
                assert (type(refused), refused.field) == (FailedPrecondition, "k_offsets")
            call.cancel()


def test_a_table_of_another_profile_model_or_shape_is_refused_at_the_start(checkpoint: Path, tmp_path: Path) -> None:
    model = fingerprint(checkpoint)
    wide = OffsetTable({(0, KV_HEADS): np.ones(HEAD_DIM, np.float32)})
    for number, (table, made_for, profile, said) in enumerate(
        [
            (a_table(1.0), model, "tt_bfp8", "'tt_bfp8', not 'f32'"),
            (a_table(1.0), "00" * 32, "f32", "calibrated for"),
            (wide, model, "f32", "heads"),
            (OffsetTable({}), model, "f32", "empty"),
        ]
    ):
        file = tmp_path / str(number)
        file.write_bytes(table.to_bytes(model_fingerprint=made_for, profile=profile))
        arguments = ["--model", str(checkpoint), "--profile", "f32", "--k-offsets", str(file)]
        config = prefill_config.config_of(prefill_config.build_parser().parse_args(arguments))
        with pytest.raises(FailedPrecondition, match=re.escape(said)) as refused:
            read_served_model(config)
        assert refused.value.field == "--k-offsets"
