"""A capture for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from google.protobuf.json_format import MessageToDict

from hma_serve.cli.kv_capture import Capture
from hma_serve.cli.kv_pipes import printable
from hma_serve.v1.kv_block_pb2 import KvCodecId, KvManifest, KvRole, KvRopePairing, KvRounding, KvScaleGranularity

STOPPED: Final = "... and more: nothing after this was looked at"
_MOST_LINES: Final = 64
_MOST_LAYERS: Final = 1024
_HEADINGS: Final = ("frame", "seq", "layer", "role", "heads", "tokens", "codec", "bytes", "crc32c", "verdict")


def as_json(capture: Capture) -> dict[str, Any]:
    """Everything, with the schema's field names; offsets are named by layer and head, without their values."""
    verdicts = _verdicts(capture)
    manifest = None
    if capture.manifest is not None:
        manifest = MessageToDict(capture.manifest, preserving_proto_field_name=True)
        for offset in manifest.get("k_offsets", []):
            offset.pop("values", None)
    return {
        "frames": capture.frames,
        "ticket": capture.opened.ticket.hex() if capture.opened is not None else None,
        "epoch": capture.opened.epoch if capture.opened is not None else None,
        "manifest": manifest,
        "payload_bytes": capture.plan.payload_bytes if capture.plan is not None else None,
        "blocks": [
            {
                "frame": frame,
                **MessageToDict(header, preserving_proto_field_name=True, always_print_fields_with_no_presence=True),
                "ticket": header.ticket.hex(),
                "prefix_hash": header.prefix_hash.hex(),
                "payload_bytes": size,
                "verdict": verdicts.get(frame, "right"),
            }
            for header, size, frame in capture.blocks
        ],
        "problems": [
            {"frame": problem.frame, "at": problem.at, "rule": problem.rule, "message": problem.message}
            for problem in capture.problems
        ],
        "stopped": capture.stopped,
    }


def as_table(capture: Capture) -> str:
    """The manifest as lines, the blocks as a table, then what is wrong."""
    lines = [printable(line) for line in _manifest_lines(capture)]
    if capture.blocks:
        lines += ["", *_aligned([_HEADINGS, *_rows(capture)])]
    lines.append("")
    lines += [printable(f"wrong: {problem}") for problem in capture.problems] or ["right"]
    if capture.stopped:
        lines.append(STOPPED)
    return "\n".join(lines)


def _verdicts(capture: Capture) -> dict[int, str]:
    return {problem.frame: problem.rule for problem in capture.problems if problem.frame is not None}


def _manifest_lines(capture: Capture) -> Iterable[str]:
    manifest = capture.manifest
    if manifest is None or capture.opened is None:
        yield "no manifest"
        return
    yield f"format       {manifest.format_major}.{manifest.format_minor}"
    yield f"ticket       {capture.opened.ticket.hex()}, epoch {capture.opened.epoch}"
    yield f"model        {manifest.model_fingerprint[:80]}"
    yield f"tokens       {manifest.token_start} to {manifest.token_start + manifest.token_count - 1}"
    pairing = _name(KvRopePairing, manifest.rope.pairing, "KV_ROPE_PAIRING_")
    yield f"rope         {pairing}, theta {manifest.rope.theta:g}, scaling {manifest.rope.scaling_hash[:80] or 'none'}"
    yield f"qk_norm      {'yes' if manifest.qk_norm else 'no'}, rotation {manifest.rotation_id}"
    yield f"k_offsets    {len(manifest.k_offsets)} vectors"
    producer = manifest.producer
    yield f"producer     {producer.vendor[:80]} {producer.device[:80]} {producer.software[:80]}".rstrip()
    for index, spec in enumerate(manifest.codecs[:_MOST_LINES]):
        yield (
            f"codec {index}      {_name(KvCodecId, spec.id, 'KV_CODEC_ID_')} v{spec.version}, scales "
            f"{_name(KvScaleGranularity, spec.granularity, 'KV_SCALE_GRANULARITY_')}, rounding "
            f"{_name(KvRounding, spec.rounding, 'KV_ROUNDING_')}"
        )
    for index, group in enumerate(manifest.layer_groups[:_MOST_LINES]):
        roles = "; ".join(
            f"{_name(KvRole, role.role, 'KV_ROLE_')} {role.kv_heads} x {role.head_dim}, codec {role.codec}"
            for role in group.roles[:_MOST_LINES]
        )
        yield f"layers {index}     {_ranges(group.layers[:_MOST_LAYERS])}: {roles}"
    listed = {"codecs": len(manifest.codecs), "layer groups": len(manifest.layer_groups)}
    for name, count in listed.items():
        if count > _MOST_LINES:
            yield f"...          {count - _MOST_LINES} more {name}"
    if manifest.critical_extensions:
        yield f"extensions   {list(manifest.critical_extensions[:_MOST_LINES])}"


def _rows(capture: Capture) -> Iterable[tuple[str, ...]]:
    verdicts = _verdicts(capture)
    for header, size, frame in capture.blocks:
        yield (
            str(frame),
            str(header.sequence),
            str(header.layer),
            _name(KvRole, header.role, "KV_ROLE_"),
            f"{header.head_start}+{header.head_count}",
            f"{header.token_start}+{header.token_count}",
            _codec_name(capture.manifest, header.codec),
            str(size),
            " ".join(f"{section.crc32c:08x}" for section in header.sections[:4]),
            verdicts.get(frame, "right") + (" last" if header.last else ""),
        )


def _codec_name(manifest: KvManifest | None, index: int) -> str:
    if manifest is None or index >= len(manifest.codecs):
        return str(index)
    return _name(KvCodecId, manifest.codecs[index].id, "KV_CODEC_ID_")


def _name(enum: Any, value: int, prefix: str) -> str:
    return enum.Name(value).removeprefix(prefix).lower() if value in enum.values() else str(value)


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as `1-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
