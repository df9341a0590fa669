"""What a service's /metrics said, and what happened between two times that it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

_MAX_BYTES = 4 << 20
_Key = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Scrape:
    """One answer.

    Attributes:
        at: Monotonic seconds.
        samples: Values by name and labels.
    """

    at: float
    samples: dict[_Key, float] = field(repr=False)

    @classmethod
    def of_text(cls, text: str, at: float) -> Scrape:
        """Parses the text format.

        Raises:
            ValueError: It is not that format.
        """
        samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return cls(at, samples)

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name that have these labels; 0 where there are none."""
        wanted = labels.items()
        return sum(
            value for (known, has), value in self.samples.items() if known == name and wanted <= dict(has).items()
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers of one service, for rates.

    Attributes:
        before: The older one; None: there is only one so far.
        now: The newest one.
    """

    before: Scrape | None
    now: Scrape

    def value(self, name: str, **labels: str) -> float:
        """The newest value of a gauge."""
        return self.now.value(name, **labels)

    def gained(self, name: str, **labels: str) -> float:
        """What a counter gained; after a restart of the service what it has."""
        value = self.now.value(name, **labels)
        before = 0.0 if self.before is None else self.before.value(name, **labels)
        return value - before if value >= before else value

    def rate(self, name: str, **labels: str) -> float:
        """What a counter gained in a second; 0 while there is one answer only."""
        if self.before is None or self.now.at <= self.before.at:
            return 0.0
        return self.gained(name, **labels) / (self.now.at - self.before.at)

    def mean(self, histogram: str) -> float | None:
        """The mean of what a histogram observed in between, or ever while there is one answer; None: nothing."""
        count = self.gained(f"{histogram}_count")
        return self.gained(f"{histogram}_sum") / count if count else None

    def share(self, name: str, outcome: str, **labels: str) -> float | None:
        """The part of a counter's gains that had this outcome; None where there were no gains."""
        whole = self.gained(name, **labels)
        return self.gained(name, outcome=outcome, **labels) / whole if whole else None


class Scraper:
    """Asks services over and over; `async with` it.

    Args:
        timeout: Seconds that one may take.
        window: Answers kept for rates, of each service.
    """

    def __init__(self, *, timeout: float, window: int) -> None:
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._window = window
        self._kept: dict[str, list[Scrape]] = {}
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Scraper:
        self._session = aiohttp.ClientSession(timeout=self._timeout)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def ask(self, urls: Iterable[str]) -> dict[str, Pair | None]:
        """Asks all at once; None for those that did not answer. Services that are not named are forgotten."""
        wanted = list(dict.fromkeys(urls))
        answers = await asyncio.gather(*map(self._one, wanted))
        kept = {url: self._kept.get(url, []) for url in wanted}
        pairs: dict[str, Pair | None] = {}
        for url, answer in zip(wanted, answers, strict=True):
            history = kept[url]
            if answer is not None:
                history.append(answer)
                del history[: -self._window]
            pairs[url] = Pair(history[0] if len(history) > 1 else None, answer) if answer is not None else None
        self._kept = kept
        return pairs

    async def _one(self, url: str) -> Scrape | None:
        try:
            async with self._session.get(url) as response:
                response.raise_for_status()
                body = await response.content.read(_MAX_BYTES)
            return Scrape.of_text(body.decode(), asyncio.get_running_loop().time())
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
