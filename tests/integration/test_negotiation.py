"""What a pair uses, chosen when a request is admitted: the producer's own codec, or else BF16, or a refusal by name.

Through real services: a decode worker that is told to read BF16 alone gets Tenstorrent block float as BF16. That loses
nothing, so the text is what the native pair gives.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from hma_serve.checkpoint import fingerprint, read_model_config, resolve_checkpoint
from hma_serve.core.errors import FailedPrecondition, HmaError, InvalidArgument
from hma_serve.decode.served_model import read_served_model
from hma_serve.kvblock import codec, describe_support
from hma_serve.v1.decode_pb2 import DecodeGenerateRequest
from hma_serve.v1.kv_block_pb2 import (
    KV_ROPE_PAIRING_HALF_SPLIT,
    KV_ROPE_PAIRING_INTERLEAVED,
    KvAgreement,
    KvSemantics,
    KvSupport,
)
from hma_serve.v1.worker_pb2 import DescribeRequest
from support import prefill_worker
from support.cluster import Cluster, running_cluster
from support.decode_worker import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    THETA,
    connected,
    emitted,
    first,
    prompt,
    refusal,
    rest,
    running_worker,
)
from support.push_receiver import PushReceiver
from support.reference import reference_generate
from support.tiny_qwen3 import make_tiny_checkpoint

NEW_TOKENS = 12


def complete(cluster: Cluster, ids: list[int]) -> list[int]:
    body = {"prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


def test_block_float_reaches_a_decode_that_reads_bf16_alone(tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint("demo")
    config = read_model_config(checkpoint)
    draw = np.random.default_rng(8)
    prompts = [draw.integers(0, config.vocab_size, length).tolist() for length in (70, 260)]
    arguments = ["--prefill-profile", "tt_bfp8", "--dtype", "float32", "--decode-arg=--codecs=bf16"]
    with running_cluster(tmp_path, *arguments) as cluster:
        texts = [complete(cluster, ids) for ids in prompts]
        again = complete(cluster, prompts[1])
        sent = cluster.metric("prefill", "kv_sent_bytes_total")
        received = cluster.metric("decode", "kv_received_bytes_total")
    assert texts == [reference_generate(checkpoint, "tt_bfp8", ids, NEW_TOKENS) for ids in prompts]
    assert again == texts[1]  # over pages of the first time
    tokens = sum((len(ids) - 1) // 32 * 32 for ids in prompts)
    assert sent == received == tokens * config.kv_elements_per_token * 2


def a_support(checkpoint: Path, *codecs: str, **semantics: object) -> KvSupport:
    meaning: dict[str, Any] = {
        "model_fingerprint": fingerprint(checkpoint),
        "layers": LAYERS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rope_theta": THETA,
        "qk_norm": True,
    }
    listed = [codec(name) for name in codecs]
    said = KvSemantics(**(meaning | semantics))
    return describe_support(said, k_codecs=listed, v_codecs=listed, rope_pairings=[KV_ROPE_PAIRING_HALF_SPLIT])


async def test_decode_chooses_from_what_is_offered_and_refuses_by_the_fields_name(checkpoint: Path) -> None:
    tokens = prompt(70)

    def offering(**fields: object) -> Callable[[DecodeGenerateRequest], None]:
        def change(request: DecodeGenerateRequest) -> None:
            support = request.offer.support
            support.CopyFrom(a_support(checkpoint, "tt_bfp8_b", "bf16"))
            for name, value in fields.items():
                if isinstance(value, list):
                    del getattr(support, name)[:]
                    getattr(support, name).extend(value)
                else:
                    setattr(support, name, value)

        return change

    def meaning(**semantics: object) -> Callable[[DecodeGenerateRequest], None]:
        return lambda request: request.offer.support.CopyFrom(a_support(checkpoint, "bf16", **semantics))

    refusals: list[tuple[Callable[[DecodeGenerateRequest], None], type[HmaError], str]] = [
        (meaning(qk_norm=False), FailedPrecondition, "semantics.qk_norm"),
        (meaning(rope_theta=1e6), FailedPrecondition, "semantics.rope_theta"),
        (meaning(model_fingerprint="ab" * 32), FailedPrecondition, "semantics.model_fingerprint"),
        (offering(semantic_hash="ab" * 32), FailedPrecondition, "semantic_hash"),
        (offering(v_codecs=[codec("nvfp4").spec()]), FailedPrecondition, "v_codecs"),
        (offering(page_tokens=[64]), FailedPrecondition, "page_tokens"),
        (offering(rope_pairings=[]), FailedPrecondition, "rope_pairings"),
        (offering(k_offsets=True), FailedPrecondition, "k_offsets"),
        (offering(format_major=2), FailedPrecondition, "format_major"),
        (offering(extensions=[9]), FailedPrecondition, "extensions"),
    ]
    with running_worker(checkpoint, "--codecs", "f32") as worker:
        async with connected(worker, checkpoint) as client:
            described = (await client.worker.Describe(DescribeRequest())).worker
            assert [spec.id for spec in described.kv.k_codecs] == [codec("f32").id, codec("bf16").id]
            for change, kind, field in refusals:
                request = client.request(tokens, 64)
                change(request)
                refused = await refusal(client.decode.Generate(request, timeout=60).read())
                assert (type(refused), refused.field) == (kind, field)

            request = client.request(tokens, 64, "tt_bfp8")
            offering()(request)
            call = client.decode.Generate(request, timeout=60)
            agreed = (await first(call)).ticket.agreement
            call.cancel()
            assert agreed == KvAgreement(
                k_codec=codec("bf16").spec(),
                v_codec=codec("bf16").spec(),
                page_tokens=32,
                rope_pairing=KV_ROPE_PAIRING_HALF_SPLIT,
            )

            # The order is the producer's, and so is the meaning of the offer's other fields where it states no support.
            request = client.request(tokens, 64)
            request.offer.support.CopyFrom(a_support(checkpoint, "tt_bfp8_b", "f32", "bf16"))
            call = client.decode.Generate(request, timeout=60)
            ticket = await first(call)
            assert ticket.ticket.agreement.k_codec == codec("f32").spec()
            await client.push(tokens[:64], ticket.ticket)
            stated = emitted(await rest(call))
            responses = await client.generate(client.request(tokens, 64))
            assert responses[0].ticket.agreement.k_codec == codec("f32").spec()
            assert emitted(responses) == stated


async def test_prefill_sends_what_it_states_and_nothing_else(tmp_path: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "tiny", layers=2, heads=8, kv_heads=2, head_dim=32, vocab=320)
    with prefill_worker.running_worker(model, tmp_path / "events") as worker:
        async with prefill_worker.connected(worker) as client:
            described = await client.describe()
            own, fallback = described.kv.k_codecs
            assert (own.id, fallback.id) == (codec("tt_bfp8_b").id, codec("bf16").id)
            right = KvAgreement(k_codec=own, v_codec=fallback, page_tokens=32, rope_pairing=KV_ROPE_PAIRING_HALF_SPLIT)
            for field, value in (
                ("k_codec", codec("nvfp4").spec()),
                ("v_codec", codec("tt_bfp4_b").spec()),
                ("page_tokens", 64),
                ("rope_pairing", KV_ROPE_PAIRING_INTERLEAVED),
                ("k_offsets", True),
            ):
                wrong = KvAgreement.FromString(right.SerializeToString())
                if isinstance(value, int):
                    setattr(wrong, field, value)
                else:
                    getattr(wrong, field).CopyFrom(value)
                with pytest.raises(InvalidArgument) as refused:
                    await client.prefill("127.0.0.1:1", [5] * 64, agreement=wrong).accepted()
                assert refused.value.field == f"agreement.{field}"
            async with PushReceiver() as receiver:
                completed = await client.prefill(receiver, [5] * 64, agreement=right).completed()
                (stream,) = receiver.streams
                codecs = {role: plan.codec.name for (_, role), plan in stream.plan.roles.items()}
                assert list(codecs.values()) == ["tt_bfp8_b", "bf16"]
                assert completed.payload_bytes == sum(stream.sizes) == 2 * 2 * 2 * (1088 + 2048)


@pytest.mark.parametrize(
    ("model", "codecs", "said"),
    [("demo", ("tt_bfp8_b", "zip"), "'zip' is none of f32, bf16"), ("narrow", ("mxfp8_e4m3",), "multiple of 32")],
)
def test_codecs_that_cannot_be_read_are_refused_at_the_start(
    tmp_path: Path, model: str, codecs: tuple[str, ...], said: str
) -> None:
    if model == "narrow":
        model = str(make_tiny_checkpoint(tmp_path / "tiny", layers=1, heads=4, kv_heads=2, head_dim=16, vocab=320))
    with pytest.raises(InvalidArgument, match=said) as refused:
        read_served_model(model, None, codecs=codecs)
    assert refused.value.field == "--codecs"
