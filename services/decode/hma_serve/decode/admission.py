"""What the front refuses before the engine hears of it: requests that no amount of waiting makes right."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hma_serve.core.errors import (
    ERRORS,
    ContextLengthExceeded,
    DeadlineExceeded,
    HmaError,
    InvalidArgument,
)
from hma_serve.core.groups import GROUP_TOKENS
from hma_serve.core.request import SamplingParams, StopConditions
from hma_serve.decode.prefix_keys import prefix_keys
from hma_serve.internal.v1 import decode_engine_pb2
from hma_serve.kvblock import Acceptance, KvFormatError, check_offer, codec_for, negotiate
from hma_serve.rpc import remaining
from hma_serve.v1 import decode_pb2, kv_block_pb2


def typed(error: KvFormatError) -> HmaError:
    """The product's error for a broken rule of the KV format."""
    return ERRORS[error.code](error.message, field=error.field)


@dataclass(frozen=True, slots=True)
class Admission:
    """Turns requests into the engine's terms.

    Attributes:
        max_model_len: Prompt plus completion, tokens.
        vocab: Tokens there are.
        acceptance: What packed KV must match.
        support: What a producer may choose from.
        share_prefixes: Whether requests of one tenant share the pages of a common prefix.
    """

    max_model_len: int
    vocab: int
    acceptance: Acceptance
    support: kv_block_pb2.KvSupport
    share_prefixes: bool = True

    def check(
        self, request: decode_pb2.DecodeGenerateRequest, call_seconds: float | None
    ) -> tuple[decode_engine_pb2.DecodeAdmit, kv_block_pb2.KvAgreement | None]:
        """The engine's form of a request, and what its producer is to send; None: it has none.

        The stream's number is left to the client of the engine.

        Args:
            request: What came.
            call_seconds: Until the deadline of the call that brought it; None: it has none.

        Raises:
            HmaError: Why it can never run here; names the field.
        """
        seconds = remaining(request.context, call_seconds)
        if seconds is not None and seconds <= 0:
            raise DeadlineExceeded("the request's deadline has passed already", field="context.deadline")
        self._check_tokens(request)
        max_tokens = self._max_tokens(request)
        sampling = SamplingParams.from_proto(request.sampling)
        for token in sampling.logit_bias:
            self._check_token(token, "sampling.logit_bias")
        admit = decode_engine_pb2.DecodeAdmit(
            epoch=request.context.epoch,
            prompt_token_ids=request.prompt_token_ids,
            emitted_token_ids=request.emitted_token_ids,
            packed_tokens=request.packed_tokens,
            sampling=request.sampling,
            stop=request.stop,
            deadline_ns=0 if seconds is None else time.monotonic_ns() + int(seconds * 1e9),
            priority=request.context.priority,
        )
        admit.stop.max_tokens = max_tokens
        if not request.packed_tokens:
            return admit, None
        if not request.HasField("offer"):
            raise InvalidArgument("packed_tokens needs an offer", field="offer")
        try:
            agreement = self._agree(request.offer)
            admit.k_codec, admit.v_codec = codec_for(agreement.k_codec).name, codec_for(agreement.v_codec).name
        except KvFormatError as exc:
            raise typed(exc) from exc
        admit.rope_pairing = agreement.rope_pairing
        if self.share_prefixes:
            packed = request.prompt_token_ids[: request.packed_tokens]
            agreed = self._agreed_offer(request.offer, agreement)
            admit.prefix_keys.extend(prefix_keys(agreed, request.context.tenant, packed))
        return admit, agreement

    def _check_tokens(self, request: decode_pb2.DecodeGenerateRequest) -> None:
        prompt, packed = len(request.prompt_token_ids), request.packed_tokens
        if not prompt:
            raise InvalidArgument("the prompt is empty", field="prompt_token_ids")
        for field, tokens in (
            ("prompt_token_ids", request.prompt_token_ids),
            ("emitted_token_ids", request.emitted_token_ids),
        ):
            if tokens:
                self._check_token(max(tokens), field)
        if packed % GROUP_TOKENS or packed >= prompt:
            raise InvalidArgument(
                f"packed_tokens must be whole groups of {GROUP_TOKENS} and leave a token of the prompt of {prompt}, "
                f"not {packed}",
                field="packed_tokens",
            )

    def _check_token(self, token: int, field: str) -> None:
        if token >= self.vocab:
            raise InvalidArgument(f"token {token} is not in the vocabulary of {self.vocab}", field=field)

    def _max_tokens(self, request: decode_pb2.DecodeGenerateRequest) -> int:
        """The length of the output at most, what was emitted before included."""
        stop = StopConditions.from_proto(request.stop)
        room = self.max_model_len - len(request.prompt_token_ids)
        wanted = 1 if stop.max_tokens is None else stop.max_tokens
        if wanted > room:
            raise ContextLengthExceeded(
                f"a prompt of {len(request.prompt_token_ids)} tokens and {wanted} more do not fit the window of "
                f"{self.max_model_len}",
                field="prompt_token_ids",
            )
        max_tokens = room if stop.max_tokens is None else stop.max_tokens
        if len(request.emitted_token_ids) >= max_tokens:
            raise InvalidArgument(
                f"{len(request.emitted_token_ids)} tokens were emitted before: nothing of max_tokens is left",
                field="emitted_token_ids",
            )
        return max_tokens

    def _agree(self, offer: decode_pb2.KvOffer) -> kv_block_pb2.KvAgreement:
        if offer.HasField("support"):
            return negotiate(offer.support, self.support)
        check_offer(offer, self.acceptance)
        return kv_block_pb2.KvAgreement(
            k_codec=offer.k_codec,
            v_codec=offer.v_codec,
            page_tokens=GROUP_TOKENS,
            rope_pairing=offer.rope.pairing,
            k_offsets=offer.k_offsets,
        )

    def _agreed_offer(self, offer: decode_pb2.KvOffer, agreement: kv_block_pb2.KvAgreement) -> decode_pb2.KvOffer:
        """What will come, as pages are named by: fields that the support overrules say what was agreed."""
        agreed = decode_pb2.KvOffer(
            model_fingerprint=self.acceptance.model_fingerprint,
            k_codec=agreement.k_codec,
            v_codec=agreement.v_codec,
            profile=offer.profile,
        )
        agreed.rope.pairing = agreement.rope_pairing
        return agreed
