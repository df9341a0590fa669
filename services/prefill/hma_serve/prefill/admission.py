"""Whether a request may enter, decided at once: a worker never lets a caller wait to be told no."""

from __future__ import annotations

from dataclasses import dataclass

from hma_serve.core.errors import ContextLengthExceeded, InvalidArgument, ResourceExhausted, Unavailable
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.prefill.load import Load
from hma_serve.v1 import kv_block_pb2, prefill_pb2

TICKET_BYTES = 16
_LEAST_RETRY_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Admission:
    """The limits of one instance.

    Attributes:
        max_tokens: Longest part of a prompt that fits both the model's window and the KV memory.
        vocab: Token ids are below it.
        max_requests: Running and waiting together.
        support: What KV can be sent as.
    """

    max_tokens: int
    vocab: int
    max_requests: int
    support: kv_block_pb2.KvSupport

    def check(self, request: prefill_pb2.PrefillRequest) -> None:
        """Refuses what could never be computed.

        Raises:
            InvalidArgument: Names the field.
            ContextLengthExceeded: More tokens than this instance takes.
        """
        tokens = len(request.token_ids)
        if not tokens or tokens % GROUP_TOKENS:
            raise InvalidArgument(
                f"prefill takes whole groups of {GROUP_TOKENS} tokens, not {tokens} tokens", field="token_ids"
            )
        if tokens > self.max_tokens:
            raise ContextLengthExceeded(
                f"{tokens} tokens exceed this worker's limit of {self.max_tokens}", field="token_ids"
            )
        if (largest := max(request.token_ids)) >= self.vocab:
            raise InvalidArgument(
                f"token id {largest} is outside the vocabulary of {self.vocab} tokens", field="token_ids"
            )
        if request.token_start % GROUP_TOKENS or request.token_start >= tokens:
            raise InvalidArgument(
                f"token_start must be a multiple of {GROUP_TOKENS} below {tokens}, not {request.token_start}",
                field="token_start",
            )
        if len(request.ticket) != TICKET_BYTES:
            raise InvalidArgument(f"a ticket has {TICKET_BYTES} bytes, not {len(request.ticket)}", field="ticket")
        if not request.context.epoch:
            raise InvalidArgument("attempts are numbered from 1", field="context.epoch")
        _check_address(request.decode_address)
        if request.HasField("agreement"):
            self._check_agreement(request.agreement)

    def require_room(self, load: Load) -> None:
        """Refuses what cannot be taken now.

        Raises:
            Unavailable: The instance drains.
            ResourceExhausted: Its queue is full; says when a retry makes sense.
        """
        if load.draining:
            raise Unavailable("this prefill worker is draining")
        if load.requests >= self.max_requests:
            raise ResourceExhausted(
                f"this prefill worker holds {load.requests} requests and takes no more",
                retry_after=max(_LEAST_RETRY_SECONDS, load.queue_seconds),
            )

    def _check_agreement(self, agreed: kv_block_pb2.KvAgreement) -> None:
        """It is a choice of what this worker states in its record."""
        support = self.support
        for field, found, choices in (
            ("k_codec", _identity(agreed.k_codec), [_identity(spec) for spec in support.k_codecs]),
            ("v_codec", _identity(agreed.v_codec), [_identity(spec) for spec in support.v_codecs]),
            ("page_tokens", agreed.page_tokens, list(support.page_tokens)),
            ("rope_pairing", agreed.rope_pairing, list(support.rope_pairings)),
            ("k_offsets", agreed.k_offsets, [support.k_offsets]),
        ):
            if found not in choices:
                raise InvalidArgument(
                    f"this prefill worker cannot send what was agreed: {field} {found}, it has {choices}",
                    field=f"agreement.{field}",
                )


def _identity(spec: kv_block_pb2.KvCodecSpec) -> tuple[int, int, int]:
    return int(spec.id), spec.version, int(spec.granularity)


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise InvalidArgument(f"decode_address must be host:port, not {address!r}", field="decode_address")
