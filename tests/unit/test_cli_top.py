"""What `hma-serve top` makes of metrics, and how it shows it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from hma_serve.cli.scrape import Pair, Scrape
from hma_serve.cli.top import parse_config
from hma_serve.cli.top_view import Seen, render
from hma_serve.core.errors import InvalidArgument
from hma_serve.core.worker import DeviceInfo, WorkerRole
from support.worker_records import a_worker

ROUTER = """
hma_router_running_requests {running}
hma_router_waiting_requests {waiting}
hma_router_requests_total{{outcome="ok"}} {ok}
hma_router_requests_total{{outcome="unavailable"}} {bad}
hma_router_slo_total{{objective="all",outcome="attained"}} {attained}
hma_router_slo_total{{objective="all",outcome="missed"}} {missed}
hma_router_slo_total{{objective="ttft",outcome="missed"}} {missed}
hma_router_time_to_first_token_seconds_count {count}
hma_router_time_to_first_token_seconds_sum {total}
"""
FIRST = ROUTER.format(running=1, waiting=0, ok=10, bad=0, attained=9, missed=1, count=10, total=1.0)
THEN = ROUTER.format(running=7, waiting=3, ok=28, bad=2, attained=24, missed=6, count=30, total=5.0)


def pair(before: str | None, now: str, seconds: float = 10.0) -> Pair:
    return Pair(None if before is None else Scrape.of_text(before, 100.0), Scrape.of_text(now, 100.0 + seconds))


def test_rates_means_and_shares_are_of_the_time_between() -> None:
    both = pair(FIRST, THEN)
    assert both.value("hma_router_running_requests") == 7
    assert both.rate("hma_router_requests_total") == 2.0
    assert both.rate("hma_router_requests_total", outcome="ok") == 1.8
    assert both.mean("hma_router_time_to_first_token_seconds") == pytest.approx(0.2)
    assert both.share("hma_router_slo_total", "attained", objective="all") == pytest.approx(0.75)
    assert both.value("no_such_metric") == 0


def test_one_look_has_no_rates_but_means_so_far() -> None:
    once = pair(None, THEN)
    assert once.rate("hma_router_requests_total") == 0
    assert once.mean("hma_router_time_to_first_token_seconds") == pytest.approx(5 / 30)


def test_a_restarted_service_starts_again_from_nothing() -> None:
    again = pair(THEN, FIRST)
    assert again.rate("hma_router_requests_total") == 1.0
    assert pair(FIRST, FIRST).mean("hma_router_time_to_first_token_seconds") is None
    assert pair(FIRST, FIRST).share("hma_router_slo_total", "attained", objective="all") is None


def seen(**changes: object) -> Seen:
    device = DeviceInfo(vendor="nvidia", name="H100", price_per_hour=3.0)
    decode = replace(a_worker(WorkerRole.DECODE, "decode-1"), device=device)
    prefill = a_worker(WorkerRole.PREFILL, "prefill-1")
    full = "hma_decode_kv_used_tokens 47000\nhma_decode_kv_capacity_tokens 100000\nhma_decode_step_seconds 0.0123\n"
    look = Seen("10:00:00", [(decode, pair(None, full)), (prefill, None)], [("http://r:8000", pair(FIRST, THEN))], None)
    return replace(look, **changes)  # type: ignore[arg-type]


def test_the_screen_shows_load_occupancy_and_objectives() -> None:
    lines = render(seen(), 200, bold=False).split("\n")
    text = "\n".join(lines)
    assert lines[0].startswith("hma-serve  10:00:00   1 router, 1 prefill, 1 decode")
    router = next(line for line in lines if line.startswith("http://r:8000"))
    assert router.split()[1:] == ["4", "3", "2.0", "0", "200.0", "-", "75%", "0.0", "0", "0"]
    decode = next(line for line in lines if line.startswith("decode-1"))
    assert "H100" in decode
    assert "3.00" in decode
    assert "[#####.....]  47%" in decode
    assert "12.3" in decode
    assert "no answer" in next(line for line in lines if line.startswith("prefill-1"))
    assert "\x1b" not in text


def test_a_narrow_screen_cuts_lines_and_headings_are_bold() -> None:
    lines = render(seen(), 30, bold=True).split("\n")
    assert max(len(line.replace("\x1b[1m", "").replace("\x1b[0m", "")) for line in lines) <= 30
    assert lines[0].startswith("\x1b[1m")


def test_an_empty_fleet_and_a_silent_registry_are_told() -> None:
    text = render(seen(workers=[], stale_seconds=12.4), 200, bold=False)
    assert "no workers are registered" in text
    assert "the registry has been away for 12 s" in text
    assert text.count("none") == 2


def test_the_command_line_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ETCD_ENDPOINTS", raising=False)
    with pytest.raises(InvalidArgument, match="--etcd"):
        parse_config([])
    with pytest.raises(InvalidArgument, match="--interval"):
        parse_config(["--etcd", "http://e:2379", "--interval", "0"])
    config = parse_config(["--etcd", "http://e:2379", "--router", "r:8000/"])
    assert config.routers == ("http://r:8000",)
    assert config.once  # standard output is no terminal here


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_screen_is_drawn_on_only_where_that_works(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    assert parse_config(["--etcd", "file:x"]).once == (term == "dumb")
    monkeypatch.setattr("sys.stdout", None)
    assert parse_config(["--etcd", "file:x"]).once
