"""How `hma-serve top` looks: a pure function of what was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hma_serve.cli.scrape import Pair
from hma_serve.core.worker import WorkerInfo, WorkerRole

_BAR_CELLS = 10
_NONE = "-"
_GONE = "no answer"

BOLD, RESET = "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the cluster.

    Attributes:
        clock: Wall clock, for the headline.
        workers: What is registered, with its metrics; None: it did not answer.
        routers: URL of each router, with its metrics.
        stale_seconds: For how long the registry has been away; None: it is there.
    """

    clock: str
    workers: Sequence[tuple[WorkerInfo, Pair | None]]
    routers: Sequence[tuple[str, Pair | None]]
    stale_seconds: float | None


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    cell: Callable[[Pair], str]


def render(seen: Seen, width: int, *, bold: bool) -> str:
    """The whole screen, lines no longer than `width`."""
    blocks = [_headline(seen), *_routers(seen), *_workers(seen, WorkerRole.PREFILL), *_workers(seen, WorkerRole.DECODE)]
    lines = []
    for line in "\n".join(blocks).split("\n"):
        heading = line.startswith("\0")
        text = line.removeprefix("\0")[:width].rstrip()
        lines.append(f"{BOLD}{text}{RESET}" if heading and bold else text)
    return "\n".join(lines)


def _headline(seen: Seen) -> str:
    count = {role: sum(w.role is role for w, _ in seen.workers) for role in (WorkerRole.PREFILL, WorkerRole.DECODE)}
    models = sorted({worker.model.id for worker, _ in seen.workers})
    parts = [
        f"hma-serve  {seen.clock}",
        (
            f"{len(seen.routers)} router{'s' * (len(seen.routers) != 1)}, {count[WorkerRole.PREFILL]} prefill, "
            f"{count[WorkerRole.DECODE]} decode"
        ),
        ", ".join(models) or "no workers are registered",
    ]
    if seen.stale_seconds is not None:
        parts.append(f"the registry has been away for {seen.stale_seconds:.0f} s")
    return "\0" + "   ".join(parts)


_ROUTER = (
    # The router's running requests include those that wait; each of a request's completions waits for itself.
    _Column(
        "running",
        lambda p: _count(max(0.0, p.value("hma_router_running_requests") - p.value("hma_router_waiting_requests"))),
    ),
    _Column("waiting", lambda p: _count(p.value("hma_router_waiting_requests"))),
    _Column("req/s", lambda p: f"{p.rate('hma_router_requests_total'):.1f}"),
    _Column("tokens/s", lambda p: _count(p.rate("hma_router_generated_tokens_total"))),
    _Column("TTFT ms", lambda p: _millis(p.mean("hma_router_time_to_first_token_seconds"))),
    _Column("TPOT ms", lambda p: _millis(p.mean("hma_router_time_per_output_token_seconds"))),
    _Column("SLO", lambda p: _percent(p.share("hma_router_slo_total", "attained", objective="all"))),
    _Column("shed/s", lambda p: f"{p.rate('hma_router_shed_total'):.1f}"),
    _Column("retries", lambda p: _count(p.value("hma_router_retries_total"))),
    _Column("migrated", lambda p: _count(p.value("hma_router_migrations_total"))),
)
_PREFILL = (
    _Column("running", lambda p: _count(p.value("hma_prefill_running_requests"))),
    _Column("waiting", lambda p: _count(p.value("hma_prefill_waiting_requests"))),
    _Column("queued tok", lambda p: _count(p.value("hma_prefill_queued_tokens"))),
    _Column("tokens/s", lambda p: _count(p.rate("hma_prefill_tokens_total"))),
    _Column("KV sent", lambda p: _bytes_per_second(p.rate("hma_prefill_kv_sent_bytes_total"))),
    _Column("exposed ms", lambda p: _millis(p.mean("hma_prefill_exposed_transfer_seconds"))),
)
_DECODE = (
    _Column("running", lambda p: _count(p.value("hma_decode_running_requests"))),
    _Column("waiting", lambda p: _count(p.value("hma_decode_waiting_requests"))),
    _Column("KV", lambda p: _bar(p.value("hma_decode_kv_used_tokens"), p.value("hma_decode_kv_capacity_tokens"))),
    _Column("step ms", lambda p: _millis(p.value("hma_decode_step_seconds") or None)),
    _Column("tokens/s", lambda p: _count(p.rate("hma_decode_tokens_total"))),
    _Column("KV in", lambda p: _bytes_per_second(p.rate("hma_decode_kv_received_bytes_total"))),
)


def _routers(seen: Seen) -> list[str]:
    rows = [([url], pair) for url, pair in seen.routers]
    return _table(["router"], rows, _ROUTER) if rows else []


def _workers(seen: Seen, role: WorkerRole) -> list[str]:
    ours = sorted((pair for pair in seen.workers if pair[0].role is role), key=lambda pair: pair[0].instance)
    columns = _PREFILL if role is WorkerRole.PREFILL else _DECODE
    return _table([str(role), "device", "format", "$/h", "state"], [(_facts(w), p) for w, p in ours], columns)


def _facts(worker: WorkerInfo) -> list[str]:
    device = worker.device
    name = device.name or device.vendor or _NONE
    price = f"{device.price_per_hour:.2f}" if device.price_per_hour else _NONE
    return [worker.instance, name, worker.profile or _NONE, price, str(worker.state)]


def _table(titles: list[str], rows: Sequence[tuple[list[str], Pair | None]], columns: Sequence[_Column]) -> list[str]:
    """Text columns to the left, numbers to the right, under a heading."""
    texts = [titles, *(facts for facts, _ in rows)]
    numbers = [[column.title for column in columns]]
    numbers += [[column.cell(pair) for column in columns] if pair is not None else [] for _, pair in rows]
    text_widths = [max(len(row[i]) for row in texts) for i in range(len(titles))]
    number_widths = [max(len(row[i]) for row in numbers if row) for i in range(len(columns))]
    lines = []
    for text, cells in zip(texts, numbers, strict=True):
        line = "  ".join(f"{cell:{size}}" for cell, size in zip(text, text_widths, strict=True))
        tail = "  ".join(f"{cell:>{size}}" for cell, size in zip(cells, number_widths, strict=True)) if cells else _GONE
        lines.append(f"{line}  {tail}")
    lines[0] = "\0" + lines[0]
    if not rows:
        lines.append("  none")
    return ["", *lines]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _millis(seconds: float | None) -> str:
    if seconds is None:
        return _NONE
    return f"{seconds * 1e3:,.1f}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{share:.0%}"


def _bytes_per_second(rate: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if rate >= size:
            return f"{rate / size:.1f} {unit}/s"
    return f"{rate:.0f} B/s"


def _bar(used: float, capacity: float) -> str:
    share = used / capacity if capacity else 0.0
    full = round(share * _BAR_CELLS)
    return f"[{'#' * full}{'.' * (_BAR_CELLS - full)}] {share:4.0%}"
