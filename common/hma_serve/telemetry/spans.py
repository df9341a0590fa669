"""The name of every span, in one file, in the order of a request's way.

A request is one trace. `request` is its root on the router (or hangs below the client's own span); everything else
hangs below it, and each attempt's work below that attempt. Attributes carry `hma.` names; those of OpenTelemetry's
GenAI conventions keep theirs.
"""

from __future__ import annotations

from typing import Final

REQUEST: Final = "hma.request"
"""Router: from the HTTP or gRPC edge to the last token."""

TOKENIZE: Final = "hma.tokenize"
"""Router: template and tokenizer."""

ADMISSION: Final = "hma.admission"
"""Router: the wait for a pair of workers with room."""

PLACEMENT: Final = "hma.placement"
"""Router: the decision that ended the wait, with what it predicted."""

ATTEMPT: Final = "hma.attempt"
"""Router: one try on one pair, from the call to decode until its end."""

PREFILL: Final = "hma.prefill"
"""Prefill: from acceptance until decode has committed the KV."""

PREFILL_QUEUE: Final = "hma.prefill.queue"
"""Prefill: from acceptance to the first layer."""

PREFILL_COMPUTE: Final = "hma.prefill.compute"
"""Prefill: one group of layers of one chunk, as computed."""

KV_SEND: Final = "hma.kv.send"
"""Prefill: the same group of layers, from the first byte handed to gRPC to the last."""

KV_RECEIVE: Final = "hma.kv.receive"
"""Decode: one KV stream, from its manifest to the commit."""

DECODE: Final = "hma.decode"
"""Decode: one Generate call, from admission to the last token."""

DECODE_WAIT: Final = "hma.decode.wait"
"""Decode: from the ticket until the prompt's KV was complete."""

DECODE_FIRST_STEP: Final = "hma.decode.first_step"
"""Decode: from then until the first token."""

DECODE_STEPS: Final = "hma.decode.steps"
"""Decode: from the first token to the last."""
