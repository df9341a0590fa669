"""Reads a capture to its end and notes every rule that is broken, where a receiver would stop at the first."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from hma_serve.kvblock import (
    KvFormatError,
    StreamPlan,
    StreamReader,
    decode_frame,
    is_plain_frame,
    split_frames,
    validate_manifest,
)
from hma_serve.v1.kv_block_pb2 import KvBlockHeader, KvManifest
from hma_serve.v1.kv_transfer_pb2 import TRANSPORT_GRPC, PushHeader, PushOpen

MAX_PROBLEMS: Final = 100
ORDER: Final = "order"
FORM: Final = "form"
TICKET_BYTES: Final = 16
_FINGERPRINT: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule.

    Attributes:
        frame: Number of the frame, from 0; None: the whole.
        at: Byte of the file at which the frame begins.
        rule: As in the document's tables; `order` for frames that do not belong where they are, `form` for what readers
            take and writers must not send.
        message: What was found.
    """

    frame: int | None
    at: int
    rule: str
    message: str

    def __str__(self) -> str:
        where = "at the end" if self.frame is None else f"frame {self.frame} at byte {self.at}"
        return f"{where}: {self.message}"


@dataclass(slots=True)
class Capture:
    """What a capture holds.

    Attributes:
        opened: Its first frame, if it is an open frame.
        plan: Of its manifest, if that breaks no rule.
        blocks: Header, payload size and frame number of each block.
        frames: How many were looked at.
        problems: What is wrong, in order; at most `MAX_PROBLEMS`.
        stopped: There were more, and what follows was not looked at.
    """

    opened: PushOpen | None = None
    plan: StreamPlan | None = None
    blocks: list[tuple[KvBlockHeader, int, int]] = field(default_factory=list)
    frames: int = 0
    problems: list[Problem] = field(default_factory=list)
    stopped: bool = False

    @property
    def manifest(self) -> KvManifest | None:
        """Of the open frame."""
        return self.opened.manifest if self.opened is not None else None

    @property
    def summary(self) -> str:
        """One line about a capture that is right."""
        size = sum(payload for _, payload, _ in self.blocks)
        return f"{self.frames} frames, {len(self.blocks)} blocks, {size} payload bytes"


def read_capture(data: bytes | bytearray) -> Capture:
    """Reads a whole capture; never raises for what the file holds."""
    return _Walk().run(data)


class _Walk:
    def __init__(self) -> None:
        self._capture = Capture()
        self._reader: StreamReader | None = None
        self._ended = False
        self._at = 0

    def run(self, data: bytes | bytearray) -> Capture:
        capture = self._capture
        try:
            for self._at, frame in split_frames(memoryview(data)):
                self._frame(frame)
                capture.frames += 1
                if capture.stopped:
                    return capture
        except KvFormatError as error:
            self._add(error.rule, error.message)
        if not self._ended and not capture.stopped:
            capture.problems.append(Problem(None, len(data), ORDER, "order: the stream has no end frame"))
        return capture

    def _frame(self, frame: memoryview) -> None:
        try:
            header, payload = decode_frame(frame)
            if not is_plain_frame(frame):
                self._misformed("a writer puts the header first, then the payload, each once, and nothing else")
            self._dispatch(header, payload)
        except KvFormatError as error:
            self._add(error.rule, error.message)

    def _dispatch(self, header: PushHeader, payload: memoryview) -> None:
        kind = header.WhichOneof("frame")
        if kind in ("open", "end") and payload.nbytes:
            self._misformed(f"{payload.nbytes} bytes of payload in an {kind} frame")
        if self._ended:
            self._misplaced("a frame follows the end frame")
        elif kind == "open":
            self._open(header.open)
        elif kind == "block":
            self._capture.blocks.append((header.block, payload.nbytes, self._capture.frames))
            self._block(header.block, payload)
        elif kind == "end":
            self._ended = True
            if self._reader is not None:
                self._reader.finish(header.end)
        else:
            self._misplaced("a frame without content")

    def _open(self, opened: PushOpen) -> None:
        if self._capture.frames:
            self._misplaced("an open frame inside the stream")
            return
        self._capture.opened = opened
        if len(opened.ticket) != TICKET_BYTES:
            self._misformed(f"a ticket of {len(opened.ticket)} bytes, not {TICKET_BYTES}")
        if TRANSPORT_GRPC not in opened.transports:
            self._misformed("TRANSPORT_GRPC is not among the transports on offer")
        if not _FINGERPRINT.fullmatch(opened.manifest.model_fingerprint):
            self._misformed("model_fingerprint is not SHA-256 in lower-case hex")
        self._capture.plan = validate_manifest(opened.manifest)
        self._reader = StreamReader(self._capture.plan, opened.ticket, opened.epoch)

    def _block(self, header: KvBlockHeader, payload: memoryview) -> None:
        if self._reader is None:
            self._misplaced("a block cannot be judged without a right open frame before it")
            return
        try:
            self._reader.validate(header, payload)
        except KvFormatError:
            self._reader.received = header.sequence + 1  # go on with what follows
            raise

    def _misplaced(self, message: str) -> None:
        self._add(ORDER, f"{ORDER}: {message}")

    def _misformed(self, message: str) -> None:
        self._add(FORM, f"{FORM}: {message}")

    def _add(self, rule: str, message: str) -> None:
        if len(self._capture.problems) < MAX_PROBLEMS:
            self._capture.problems.append(Problem(self._capture.frames, self._at, rule, message))
        else:
            self._capture.stopped = True
