"""Reads a capture to its end and notes every rule that is broken, where a receiver would stop at the first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from hma_serve.kvblock import KvFormatError, StreamPlan, StreamReader, decode_frame, split_frames, validate_manifest
from hma_serve.v1.kv_block_pb2 import KvBlockHeader, KvManifest
from hma_serve.v1.kv_transfer_pb2 import PushOpen

MAX_PROBLEMS: Final = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule.

    Attributes:
        frame: Number of the frame, from 0; None: the whole.
        at: Byte of the file at which the frame begins.
        rule: As in the document's tables; `order` for frames that do not belong where they are.
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
        frames: How many.
        problems: What is wrong, in order; at most `MAX_PROBLEMS`.
    """

    opened: PushOpen | None = None
    plan: StreamPlan | None = None
    blocks: list[tuple[KvBlockHeader, int, int]] = field(default_factory=list)
    frames: int = 0
    problems: list[Problem] = field(default_factory=list)

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

    def run(self, data: bytes | bytearray) -> Capture:
        capture, at = self._capture, 0
        try:
            for at, frame in split_frames(memoryview(data)):
                self._frame(at, frame)
                capture.frames += 1
                if len(capture.problems) >= MAX_PROBLEMS:
                    return capture
        except KvFormatError as error:
            self._note(capture.frames, at, error)
        if not self._ended:
            capture.problems.append(Problem(None, len(data), "order", "order: the stream has no end frame"))
        return capture

    def _frame(self, at: int, frame: memoryview) -> None:
        number = self._capture.frames
        try:
            header, payload = decode_frame(frame)
            kind = header.WhichOneof("frame")
            if self._ended:
                self._misplaced(at, "a frame follows the end frame")
            elif kind == "open":
                self._open(at, header.open)
            elif kind == "block":
                self._capture.blocks.append((header.block, payload.nbytes, number))
                self._block(at, header.block, payload)
            elif kind == "end":
                self._ended = True
                if self._reader is not None:
                    self._reader.finish(header.end)
            else:
                self._misplaced(at, "a frame without content")
        except KvFormatError as error:
            self._note(number, at, error)

    def _open(self, at: int, opened: PushOpen) -> None:
        if self._capture.frames:
            self._misplaced(at, "an open frame inside the stream")
            return
        self._capture.opened = opened
        self._capture.plan = validate_manifest(opened.manifest)
        self._reader = StreamReader(self._capture.plan, opened.ticket, opened.epoch)

    def _block(self, at: int, header: KvBlockHeader, payload: memoryview) -> None:
        if self._reader is None:
            self._misplaced(at, "a block cannot be judged without a right open frame before it")
            return
        try:
            self._reader.validate(header, payload)
        except KvFormatError:
            self._reader.received = header.sequence + 1  # go on with what follows
            raise

    def _misplaced(self, at: int, message: str) -> None:
        self._capture.problems.append(Problem(self._capture.frames, at, "order", f"order: {message}"))

    def _note(self, frame: int, at: int, error: KvFormatError) -> None:
        self._capture.problems.append(Problem(frame, at, error.rule, error.message))
