"""Sends one request's KV to decode, layer by layer, as native bytes under the receiver's credit.

A layer is never held back to fill a message: what the engine hands over leaves at once, cut into blocks of about 1 MiB.
For a receiver that does not read the native codec, BF16 was agreed: then each layer is packed again on its way out, on
a thread beside the loop; the engine, its cache and its slots know nothing of it.
`send_layer` returns when gRPC has taken the layer's last byte, and only then may the slot be reused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hma_serve.core.errors import FailedPrecondition
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.internal.v1 import prefill_engine_pb2 as engine_pb
from hma_serve.ipc import Arena
from hma_serve.kvblock import (
    BEST_PAYLOAD_BYTES,
    HEADER_ROOM_BYTES,
    Codec,
    RolePlan,
    StreamWriter,
    align_payload,
    encode_frame,
    transcode,
    validate_manifest,
)
from hma_serve.prefill.guard import Guard
from hma_serve.prefill.kv_layout import ROLES, KvLayout
from hma_serve.prefill.push_call import DECODE_ADDRESS
from hma_serve.prefill.push_stream import Patience, PushStream
from hma_serve.rpc import ChannelCache
from hma_serve.v1 import common_pb2, kv_block_pb2, kv_transfer_pb2


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a request's KV goes.

    Attributes:
        address: host:port of decode's KvTransfer.
        ticket: 16 bytes, granted by decode.
        epoch: Attempt; equals the ticket's.
    """

    address: str
    ticket: bytes
    epoch: int


@dataclass(frozen=True, slots=True)
class Transfers:
    """What all transfers of one instance share.

    Attributes:
        channels: To decodes, one per address.
        arena: Where the engine leaves layers.
        layout: How they lie there.
        packed_as: In which codecs, in the order of `ROLES`.
        manifest: Builds the manifest of a token range (start, count) under an agreement.
        patience: Of one transfer with its receiver.
        ranks: Devices that share the heads; each one's leave as blocks of their own.
    """

    channels: ChannelCache
    arena: Arena
    layout: KvLayout
    packed_as: tuple[Codec, Codec]
    manifest: Callable[[int, int, kv_block_pb2.KvAgreement | None], kv_block_pb2.KvManifest]
    patience: Patience
    ranks: int = 1


class Streamer:
    """One transfer: `async with` connects and performs the handshake; leaving ends the call, whatever happened.

    Args:
        transfers: See there.
        destination: Where to.
        token_start: First token that travels.
        token_count: Tokens that travel.
        agreement: What they travel as; None: as they are packed.
        guard: The request's.
        trace: Passed on.
    """

    def __init__(
        self,
        transfers: Transfers,
        destination: Destination,
        *,
        token_start: int,
        token_count: int,
        agreement: kv_block_pb2.KvAgreement | None,
        guard: Guard,
        trace: common_pb2.TraceContext,
    ) -> None:
        self._transfers = transfers
        self._destination = destination
        self._manifest = transfers.manifest(token_start, token_count, agreement)
        self._plan = validate_manifest(self._manifest)
        self._writer = StreamWriter(self._plan, destination.ticket, destination.epoch)
        self._token_end = token_start + token_count
        self._guard = guard
        self._trace = trace
        self._exit = AsyncExitStack()
        self._stream: PushStream
        self._max_payload = BEST_PAYLOAD_BYTES

    @property
    def sent_bytes(self) -> int:
        """Payload bytes handed to the transport."""
        return self._stream.sent_bytes

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            address = self._destination.address
            channel = stack.enter_context(self._transfers.channels.lease(address))
            stream = PushStream(
                channel, address, self._guard, patience=self._transfers.patience, opening=self._opening()
            )
            self._stream = await stack.enter_async_context(stream)
            self._max_payload = self._payload_limit(await self._stream.open())
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.__aexit__(kind, value, trace)

    async def send_layer(self, done: engine_pb.PrefillLayerDone) -> None:
        """Sends what lies in a layer's slot; the slot is free when this returns or raises."""
        if not done.token_count:
            return
        layout = self._transfers.layout
        size = layout.layer_bytes(done.chunk_tokens, done.head_count)
        views = layout.views(self._transfers.arena.slot(done.slot, size), done.chunk_tokens, done.head_count)
        first = (done.token_start - done.chunk_start) // GROUP_TOKENS
        sent = slice(first, first + done.token_count // GROUP_TOKENS)
        ends_stream = done.layer == layout.layers - 1 and done.token_start + done.token_count == self._token_end
        each = done.head_count // self._transfers.ranks
        for role, packed_as, packed in zip(ROLES, self._transfers.packed_as, views, strict=True):
            units = await self._as_agreed(self._plan.roles[done.layer, role], packed_as, packed[:, sent])
            for head in range(0, done.head_count, each):
                blocks = self._writer.blocks(
                    done.layer,
                    role,
                    units[head : head + each],
                    token_start=done.token_start,
                    head_start=done.head_start + head,
                    last=ends_stream and role == ROLES[-1] and head + each == done.head_count,
                    max_payload=self._max_payload,
                )
                for header, payload in blocks:
                    align_payload(header, payload.nbytes)
                    await self._stream.await_credit(payload.nbytes)
                    await self._stream.send_block(encode_frame(header, payload), payload.nbytes)

    async def _as_agreed(self, agreed: RolePlan, packed_as: Codec, units: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Units [heads, groups, group bytes] as they travel."""
        if agreed.codec is packed_as:
            return units
        # A copy: a cancelled request gives its slot back while the thread still reads.
        return await asyncio.to_thread(transcode, units.copy(), packed_as, agreed.codec, agreed.head_dim)

    async def commit(self) -> None:
        """Ends the stream and waits until decode has committed every block."""
        header = kv_transfer_pb2.PushHeader(end=kv_transfer_pb2.PushEnd(blocks=self._writer.sent))
        await self._stream.finish(encode_frame(header))

    def _opening(self) -> kv_transfer_pb2.PushOpen:
        return kv_transfer_pb2.PushOpen(
            ticket=self._destination.ticket,
            epoch=self._destination.epoch,
            transports=[kv_transfer_pb2.TRANSPORT_GRPC],
            manifest=self._manifest,
            trace=self._trace,
        )

    def _payload_limit(self, accepted: kv_transfer_pb2.PushAccepted) -> int:
        """Bytes of payload in one block: our best size, unless the receiver's messages or credit are smaller.

        Credit is a window, so a block larger than the first grant might never fit.
        """
        if accepted.transport != kv_transfer_pb2.TRANSPORT_GRPC:
            raise FailedPrecondition(
                f"decode at {self._destination.address} chose a transport that was not offered", field=DECODE_ADDRESS
            )
        smallest = max(role.group_bytes for role in self._plan.roles.values())
        limit = min(BEST_PAYLOAD_BYTES, accepted.max_message_bytes - HEADER_ROOM_BYTES)
        if limit < smallest:
            raise FailedPrecondition(
                f"decode at {self._destination.address} takes messages of {accepted.max_message_bytes} bytes; "
                f"one group of 32 tokens needs {smallest + HEADER_ROOM_BYTES}",
                field=DECODE_ADDRESS,
            )
        return max(smallest, min(limit, accepted.credit_bytes or limit))
