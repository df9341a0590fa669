"""What a line's pace says, and how sure it is."""

from __future__ import annotations

import pytest

from hma_serve.router.line_pace import LinePace

HERE, OTHERS = frozenset({"here"}), frozenset({"others"})


def moved(*pauses: float) -> LinePace:
    """A line that formed at 0 and got room after each pause."""
    pace, now = LinePace(), 0.0
    pace.begin(now, HERE)
    for pause in pauses:
        now += pause
        pace.moved(now)
    return pace


def least(pace: LinePace) -> float:
    forecast = pace.forecast()
    assert forecast is not None
    return forecast.seconds


def test_nothing_is_said_of_a_few_rooms_and_more_of_more() -> None:
    assert moved(*[1.0] * 7).forecast() is None
    assert moved(*[1.0] * 7).wait(10) == 0
    assert moved(*[1.0] * 8).wait(10) == 10
    assert least(moved(*[1.0] * 8)) < 0.5
    assert least(moved(*[1.0] * 1000)) == pytest.approx(1, abs=0.1)


def test_the_later_half_counts_where_it_is_faster_and_much_faster_says_nothing() -> None:
    assert least(moved(*[1.3] * 500, *[1.0] * 500)) < 1.0
    assert least(moved(*[1.0] * 500, *[1.3] * 500)) < 1.15
    assert moved(*[2.0] * 500, *[1.0] * 500).forecast() is None


def test_other_workers_make_everything_unknown() -> None:
    pace = moved(*[1.0] * 100)
    pace.under(HERE, 100)
    assert pace.forecast() is not None
    pace.under(OTHERS, 100)
    assert (pace.forecast(), pace.wait(10), pace.guess(10, 100)) == (None, 0, 0)
