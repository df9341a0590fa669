"""Tables and picture of docs/kernels.md out of bench/results: `python -m bench.decode.page` makes them anew.

Each table is found by its header and replaced as a whole; what is said about it is not, so read that again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.decode.picture import picture
from bench.decode.step import StepRow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
PICTURE = ROOT / "docs" / "decode.svg"
MODELS = ("4B", "8B", "14B", "32B")
_CODECS = ("tt_bfp8_b", "int8", "fp8_e4m3fn", "mxfp8_e4m3", "nvfp4", "bf16")
_CODEC_POINTS = ((8, 4096), (32, 4096), (128, 4096), (8, 16384), (32, 16384), (128, 16384))

Row = dict[str, Any]


def results(part: str) -> Row:
    """What one run left."""
    found: Row = json.loads((ROOT / "bench" / "results" / f"decode_h200_{part}.json").read_text())
    return found


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _number(value: float | None, places: int) -> str:
    return "–" if value is None else f"{value:,.{places}f}"


def _of(row: Row) -> str:
    return f"{row['batch']} x {row['context']:,}"


def _steps() -> Iterator[tuple[str, Row, Row]]:
    """Model, packed and materialised."""
    rows = results("steps")["steps"]
    for model in MODELS:
        of_it = [row for row in rows if row["model"] == model]
        for packed in (row for row in of_it if row["page_format"] != "bf16"):
            [plain] = [row for row in of_it if row["page_format"] == "bf16" and _of(row) == _of(packed)]
            yield model, packed, plain


def steps() -> Iterator[str]:
    """Whole steps with packed KV."""
    for model, row, _ in _steps():
        times = [_number(row[name], 2) for name in ("ms", "gemm_ms", "attention_ms")]
        faster = f"{row['vllm_ms'] / row['ms']:.2f}x"
        yield _line(
            model,
            _of(row),
            *times,
            f"{StepRow(**row).rest:.0%}",
            _number(row["floor_ms"], 2),
            _number(row["vllm_ms"], 2),
            faster,
        )


def modes() -> Iterator[str]:
    """The same beside materialised KV."""
    for model, packed, plain in _steps():
        cells = [cell for row in (packed, plain) for cell in (_number(row["ms"], 2), _number(row["kv_gb"], 1))]
        yield _line(model, _of(packed), *cells, _number(plain["vllm_ms"], 2))


def _attention() -> dict[tuple[int, str, str, bool], Row]:
    rows = results("attention")["attention"]
    return {(row["group"], row["page_format"], _of(row), row["balanced"]): row for row in rows}


def attention() -> Iterator[str]:
    """Attention over `tt_bfp8_b` beside other implementations on BF16."""
    found = _attention()
    beside = {(row["group"], _of(row)): row for row in results("beside")["beside"]}
    for group in (4, 5, 8):
        for (of_group, codec, at, balanced), row in found.items():
            if (of_group, codec, balanced) != (group, "tt_bfp8_b", True):
                continue
            uneven, others = found.get((group, codec, at, False)), beside[group, at]
            yield _line(
                group,
                at,
                _number(row["us"], 1),
                _number(row["tb_per_s"], 2),
                f"{row['of_copy']:.0%}",
                f"{uneven['of_copy']:.0%}" if uneven else "–",
                _number(row["sdpa_us"], 1),
                f"{row['sdpa_us'] / row['us']:.2f}x",
                _number(others["flashinfer_us"], 1),
                _number(others["flex_us"], 0),
            )


def codecs() -> Iterator[str]:
    """Attention of four query heads over every way in which pages are read, imbalanced batches in brackets."""
    found = _attention()
    for batch, context in _CODEC_POINTS:
        at = f"{batch} x {context:,}"
        rows = [(found[4, codec, at, True], found[4, codec, at, False]) for codec in _CODECS]
        yield _line(at, *(f"{row['us']:,.0f} us, {row['of_copy']:.0%} ({other['of_copy']:.0%})" for row, other in rows))


def extends() -> Iterator[str]:
    """Several query tokens of a sequence, by how many are read together."""
    found: dict[tuple[int, str, int], dict[int, Row]] = {}
    for row in results("extend")["extend"]:
        if row["page_format"] == "tt_bfp8_b":
            found.setdefault((row["group"], _of(row), row["tokens"]), {})[row["queries"]] = row
    for (group, at, tokens), rows in found.items():
        one, two, three = (_number(rows[queries]["us"], 1) for queries in (1, 16 // group, 24 // group))
        yield _line(group, f"{at}, {tokens}", one, f"**{two}**", three, _number(rows[1]["sdpa_us"], 1))


def products() -> Iterator[str]:
    """All products of a step of the 8B."""
    for row in results("products")["products"]:
        yield _line(row["rows"], _number(row["own_ms"], 2), _number(row["library_ms"], 2))


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "| model | batch x context | step, ms |": steps,
    "| model | batch x context | packed: step, ms |": modes,
    "| query heads | batch x context |": attention,
    "| batch x context | `tt_bfp8_b` |": codecs,
    "| query heads | sequences x context, query tokens |": extends,
    "| rows | `matvec`, `skinny` |": products,
}
"""By how a header begins."""


def with_tables(text: str) -> str:
    """The page with its tables made anew.

    Raises:
        StopIteration: It lacks one.
    """
    lines = text.split("\n")
    for header, rows in TABLES.items():
        begin = 2 + next(at for at, line in enumerate(lines) if line.startswith(header))
        end = next(at for at in range(begin, len(lines)) if not lines[at].startswith("|"))
        lines[begin:end] = rows()
    return "\n".join(lines)


def steps_picture() -> str:
    """Whole steps with packed KV, smaller models first."""
    found = results("steps")
    return picture(found | {"steps": sorted(found["steps"], key=lambda row: MODELS.index(row["model"]))})


if __name__ == "__main__":
    PICTURE.write_text(steps_picture())
    PAGE.write_text(with_tables(PAGE.read_text()))
