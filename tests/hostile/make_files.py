"""Writes one capture per rule of the KV block format, broken in exactly that rule. Run once: the files are kept.

`python tests/hostile/make_files.py OUT`. A file is named after the rule that a reader must refuse it with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from google_crc32c import value as crc32c

from hma_serve import kvblock
from hma_serve.v1.kv_block_pb2 import KvBlockHeader, KvLayerGroup, KvOffset
from hma_serve.v1.kv_transfer_pb2 import TRANSPORT_GRPC, PushEnd, PushHeader, PushOpen
from support.kv_streams import EPOCH, HEAD_DIM, TICKET, random_units, small_manifest, small_plan

Change = Callable[["Stream"], None]
CODEC_OF_RULE = {"uneven_scales": "fp8_e4m3fn.tensor"}


class Stream:
    """A right stream in pieces, to be broken: manifest, blocks with payloads, and the count in the end frame."""

    def __init__(self, codec: str = "tt_bfp8_b") -> None:
        plan = small_plan(codec)
        self.manifest = small_manifest(codec)
        self.blocks: list[tuple[KvBlockHeader, bytearray]] = []
        writer = kvblock.StreamWriter(plan, TICKET, EPOCH)
        for layer, role in plan.roles:
            units = random_units(plan, seed=layer)
            for header, payload in writer.blocks(layer, role, units, token_start=32):  # type: ignore[arg-type]
                self.blocks.append((header.block, bytearray(np.ascontiguousarray(payload).tobytes())))
        self.blocks[-1][0].last = True
        self.count = len(self.blocks)

    def frames(self) -> Iterator[bytes]:
        """The serialised frames."""
        opened = PushOpen(ticket=TICKET, epoch=EPOCH, transports=[TRANSPORT_GRPC], manifest=self.manifest)
        yield kvblock.encode_frame(PushHeader(open=opened))
        for header, payload in self.blocks:
            yield kvblock.encode_frame(PushHeader(block=header), bytes(payload))
        yield kvblock.encode_frame(PushHeader(end=PushEnd(blocks=self.count)))


def _manifest(**fields: object) -> Change:
    def change(stream: Stream) -> None:
        for name, value in fields.items():
            setattr(stream.manifest, name, value)

    return change


def _block(**fields: object) -> Change:
    def change(stream: Stream) -> None:
        for name, value in fields.items():
            setattr(stream.blocks[0][0], name, value)

    return change


def _section(**fields: object) -> Change:
    def change(stream: Stream) -> None:
        for name, value in fields.items():
            setattr(stream.blocks[0][0].sections[0], name, value)

    return change


def _payload(at: int, byte: int) -> Change:
    """A byte changed, with the checksum that then is right."""

    def change(stream: Stream) -> None:
        header, payload = stream.blocks[0]
        payload[at] = byte
        header.sections[0].crc32c = crc32c(bytes(payload))

    return change


def _do(*steps: Callable[[Stream], object]) -> Change:
    def change(stream: Stream) -> None:
        for step in steps:
            step(stream)

    return change


BROKEN: dict[str, Change] = {
    "unsupported_version": _manifest(format_major=2),
    "unknown_critical_extension": _do(lambda stream: stream.manifest.critical_extensions.append(7)),
    "empty_manifest": _do(lambda stream: stream.manifest.ClearField("layer_groups")),
    "limit_exceeded": _manifest(token_count=2**32 - 64),
    "limit_exceeded.roles": _do(
        lambda stream: stream.manifest.layer_groups[0].roles.extend([stream.manifest.layer_groups[0].roles[0]] * 99)
    ),
    "partial_group": _manifest(token_count=63),
    "unknown_codec": _do(lambda stream: setattr(stream.manifest.codecs[0], "version", 9)),
    "unknown_role": _do(lambda stream: setattr(stream.manifest.layer_groups[0].roles[0], "role", 3)),
    "wrong_codec": _block(codec=1),
    "bad_geometry": _do(lambda stream: setattr(stream.manifest.layer_groups[0].roles[0], "head_dim", 33)),
    "duplicate_layer": _do(
        lambda stream: stream.manifest.layer_groups.append(
            KvLayerGroup(layers=[1], roles=stream.manifest.layer_groups[0].roles)
        )
    ),
    "bad_k_offset": _do(
        lambda stream: stream.manifest.k_offsets.append(KvOffset(values=np.full(HEAD_DIM, np.nan, "<f4").tobytes()))
    ),
    "wrong_ticket": _block(ticket=bytes(16)),
    "wrong_epoch": _block(epoch=4),
    "wrong_sequence": _block(sequence=1),
    "unknown_layer": _block(layer=2),
    "wrong_token_order": _block(token_order=2),
    "wrong_padding": _block(padded_count=96),
    "tokens_out_of_range": _block(token_start=2**32 - 32),
    "heads_out_of_range": _block(head_start=2**32 - 1),
    "bad_prefix_hash": _block(prefix_hash=bytes(65)),
    "wrong_section_count": _do(lambda stream: stream.blocks[0][0].sections.add()),
    "wrong_section_kind": _section(kind=2),
    "wrong_section_offset": _section(offset=2**32 - 1),
    "wrong_section_length": _section(length=2**32 - 1),
    "truncated_payload": _do(lambda stream: stream.blocks[0][1].pop()),
    "trailing_bytes": _do(lambda stream: stream.blocks[0][1].append(0)),
    "checksum_mismatch": _section(crc32c=1),
    "banned_code": _payload(64, 0x80),
    "banned_code.exponent": _payload(0, 255),
    "overlapping_range": _block(layer=1),
    "uneven_scales": _payload(-1, 0x3F),
    "wrong_block_count": _do(lambda stream: setattr(stream, "count", 3)),
    "incomplete_coverage": _do(lambda stream: stream.blocks.pop(), lambda stream: setattr(stream, "count", 3)),
}
RAW: dict[str, bytes] = {
    "malformed_frame": b"\x04\x0a\x02\xff\xff",
    "malformed_frame.cut": b"\x7f\x0a\x02",
    "message_too_large": b"\x81\x80\x80\x01" + bytes(64),
    "message_too_large.length": b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
}


def capture(rule: str) -> bytes:
    """The file of that name."""
    if rule in RAW:
        return RAW[rule]
    stream = Stream(CODEC_OF_RULE.get(rule, "tt_bfp8_b"))
    BROKEN[rule](stream)
    return b"".join(kvblock.join_frames(stream.frames()))


def main(out: Path) -> None:
    """Writes all files."""
    out.mkdir(parents=True, exist_ok=True)
    for rule in (*BROKEN, *RAW):
        (out / f"{rule}.kv").write_bytes(capture(rule))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
