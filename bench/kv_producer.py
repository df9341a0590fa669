"""A producer of KV for measurements: valid blocks of random values, for a prompt that nobody computed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc.aio
import numpy as np

from bench.figures import SEED
from hma_serve.core.model_config import ModelConfig
from hma_serve.kvblock import (
    StreamWriter,
    align_payload,
    build_manifest,
    codec,
    encode_frame,
    validate_manifest,
)
from hma_serve.v1 import common_pb2, decode_pb2, decode_pb2_grpc, kv_block_pb2, kv_transfer_pb2

PUSH = "/hma_serve.v1.KvTransfer/Push"
ROLES = (kv_block_pb2.KV_ROLE_K, kv_block_pb2.KV_ROLE_V)
_ATTEMPTS = 400

CALL_SECONDS = 900.0
"""A request's deadline: long enough for any that is measured."""


def request(
    prompt: list[int], new_tokens: int, packed: int = 0, offer: decode_pb2.KvOffer | None = None, tenant: str = ""
) -> decode_pb2.DecodeGenerateRequest:
    """A greedy request, its first tokens' KV packed or none."""
    return decode_pb2.DecodeGenerateRequest(
        context=common_pb2.RequestContext(request_id="bench", epoch=1, tenant=tenant),
        prompt_token_ids=prompt,
        packed_tokens=packed,
        offer=offer,
        sampling=common_pb2.SamplingParams(temperature=0.0),
        stop=common_pb2.StopConditions(max_tokens=new_tokens, ignore_eos=True),
    )


class Producer:
    """Sends the KV of prompts of one length; one layer's values serve for all layers.

    Args:
        config: Of the model.
        model: Its fingerprint.
        codec_name: Of keys and values.
        tokens: Of a prompt, whole groups.
    """

    def __init__(self, config: ModelConfig, model: str, codec_name: str, tokens: int) -> None:
        known = codec(codec_name)
        rope = kv_block_pb2.KvRope(pairing=kv_block_pb2.KV_ROPE_PAIRING_HALF_SPLIT, theta=config.rope_theta)
        self._layers, self._tokens = config.num_layers, tokens
        self._offer = decode_pb2.KvOffer(
            model_fingerprint=model, k_codec=known.spec(), v_codec=known.spec(), rope=rope, producer_instance="bench"
        )
        self._manifest = build_manifest(
            model_fingerprint=model,
            layers=config.num_layers,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            k_codec=known,
            token_start=0,
            token_count=tokens,
            rope=rope,
            qk_norm=True,
        )
        shape = (config.num_kv_heads, tokens, config.head_dim)
        values = np.random.default_rng(SEED).standard_normal(shape).astype(np.float32)
        self._packed = known.encode(values)

    def request(self, new_tokens: int, tenant: str = "") -> decode_pb2.DecodeGenerateRequest:
        """A request for such a prompt; the same prompt of another tenant finds no pages of this one's."""
        return request([3] * (self._tokens + 1), new_tokens, self._tokens, self._offer, tenant)

    async def ticket(self, decode: grpc.aio.Channel, push_address: str = "") -> tuple[Any, decode_pb2.Ticket]:
        """A request that only waits for its KV, and its ticket: one for this receiver if any is named."""
        stub: Any = decode_pb2_grpc.DecodeStub(decode)
        for attempt in range(_ATTEMPTS):
            call = stub.Generate(self.request(1, f"{push_address} {attempt}"), timeout=CALL_SECONDS)
            ticket = (await call.read()).ticket
            if push_address in ("", ticket.push_address):
                return call, ticket
            call.cancel()
        raise RuntimeError(f"no ticket names {push_address}")

    async def fill(
        self,
        channel: grpc.aio.Channel,
        ticket: decode_pb2.Ticket,
        *,
        rate: float = 0.0,
        commit: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> int:
        """Sends a prompt's KV; without the commit the ticket can be filled again.

        Args:
            channel: To the receiver.
            ticket: Which request.
            rate: Payload bytes per second at most; 0: as fast as it is taken.
            commit: Ends the stream, so that the request begins.
            stopped: Asked after each block; once it says so, no more are sent.

        Returns:
            Payload bytes that were sent, once all of them are in pages.
        """
        writer = StreamWriter(validate_manifest(self._manifest), ticket.nonce, ticket.epoch)
        stream, credit = await self._opened(channel, ticket)
        began = time.perf_counter()
        for header, payload in self._blocks(writer):
            while writer.payload_bytes > credit:
                credit = (await stream.read()).ack.credit_bytes
            if rate and (early := began + writer.payload_bytes / rate - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            await stream.write(encode_frame(header, payload))
            if stopped():
                break
        while (await stream.read()).ack.blocks < writer.sent:
            pass
        if commit:
            end = kv_transfer_pb2.PushHeader(end=kv_transfer_pb2.PushEnd(blocks=writer.sent))
            await stream.write(encode_frame(end))
            while not (await stream.read()).HasField("committed"):
                pass
        stream.cancel()
        return writer.payload_bytes

    async def _opened(self, channel: grpc.aio.Channel, ticket: decode_pb2.Ticket) -> tuple[Any, int]:
        """A stream, and its credit; waits until the one before has let the ticket go."""
        method: Any = channel.stream_stream(
            PUSH, request_serializer=None, response_deserializer=kv_transfer_pb2.PushResponse.FromString
        )
        opened = kv_transfer_pb2.PushOpen(
            ticket=ticket.nonce,
            epoch=ticket.epoch,
            transports=[kv_transfer_pb2.TRANSPORT_GRPC],
            manifest=self._manifest,
        )
        for _ in range(_ATTEMPTS):
            stream = method()
            await stream.write(encode_frame(kv_transfer_pb2.PushHeader(open=opened)))
            first = await stream.read()
            if first.HasField("accepted"):
                return stream, first.accepted.credit_bytes
            stream.cancel()
            if first.refused.error.field != "ticket":
                break
            await asyncio.sleep(0.005)
        raise RuntimeError(f"a KV stream is not accepted: {first}")

    def _blocks(self, writer: StreamWriter) -> Iterator[Any]:
        for layer in range(self._layers):
            for role in ROLES:
                last = (layer, role) == (self._layers - 1, ROLES[-1])
                for header, payload in writer.blocks(layer, role, self._packed, token_start=0, last=last):
                    align_payload(header, payload.nbytes)
                    yield header, payload
