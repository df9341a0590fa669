"""What a client was told once and every call of it obeys; equal for both kinds of client."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hma_serve.client import _kinds as kinds
from hma_serve.client._channels import parse_addresses
from hma_serve.client._retry import Attempts, Deadline, RetryPolicy


@dataclass(frozen=True)
class Settings:
    """A client's arguments, checked.

    Attributes:
        addresses: Where routers listen.
        timeout: Seconds that a request may take unless it says otherwise; None: no limit.
        retry: How persistent to be.
        metadata: Headers of every call.
        random: Uniform in [0, 1).
    """

    addresses: tuple[str, ...]
    timeout: float | None
    retry: RetryPolicy
    metadata: tuple[tuple[str, str], ...]
    random: Callable[[], float] = random.random

    @classmethod
    def checked(
        cls,
        address: str | Sequence[str],
        timeout: float | None,
        retry: RetryPolicy | None,
        metadata: Mapping[str, str] | None,
    ) -> Settings:
        """Raises InvalidArgument when an argument cannot be right."""
        kinds.TEXTS.check("address", address)
        kinds.HEADERS.check("metadata", metadata or {})
        Deadline(timeout)
        return cls(parse_addresses(address), timeout, retry or RetryPolicy(), tuple((metadata or {}).items()))

    def timeout_or(self, timeout: float | None) -> float | None:
        """The seconds of one request, checked; raises InvalidArgument."""
        return Deadline(self.timeout if timeout is None else timeout).timeout

    def attempts(self, timeout: float | None, *, first: int) -> Attempts:
        """The course of a request that starts now, at the address numbered `first`."""
        return Attempts(self.retry, len(self.addresses), first, Deadline(timeout), self.random)
