"""The shape of a profile's file: every key typed, none unknown, before anything is made of it.

Hand-written rather than a schema library: a dozen keys, and an error must name the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Wanted = TypeVar("Wanted")


@dataclass(frozen=True, slots=True)
class Device:
    """Hardware that runs a profile. Rates are dense and the vendor's unless the source says measured.

    Attributes:
        name: Vendor and product.
        memory_kind: For example GDDR6.
        memory_gb: Capacity, GB.
        memory_gb_per_s: Bandwidth, GB/s.
        tflops: In the profile's arithmetic, TFLOP/s (TOP/s for integers).
        watts: Board power.
        price_usd: Lowest and highest price seen; None: not known.
        usd_per_hour: Lowest and highest rent seen; None: not known.
        source: Where the figures come from.
    """

    name: str
    memory_kind: str
    memory_gb: float
    memory_gb_per_s: float
    tflops: float
    watts: float
    price_usd: tuple[float, float] | None
    usd_per_hour: tuple[float, float] | None
    source: str


@dataclass(frozen=True, slots=True)
class ProfileFile:
    """What one file says; names are not checked yet. Attributes as of `Profile`."""

    name: str
    weights: str
    activations: str
    compute: str
    k_codec: str
    v_codec: str
    devices: tuple[Device, ...]


def read_profile_file(table: Mapping[str, Any]) -> ProfileFile:
    """Reads a parsed file.

    Raises:
        TypeError: A key is of another type; names it.
        ValueError: A key is missing, unknown or out of range; names it.
    """
    reader = _Table(table, "")
    kv = _Table(reader.take("kv", dict), "kv.")
    devices = reader.take("devices", list, default=[])
    found = ProfileFile(
        name=reader.take("name", str),
        weights=reader.take("weights", str),
        activations=reader.take("activations", str),
        compute=reader.take("compute", str),
        k_codec=kv.take("k", str),
        v_codec=kv.take("v", str),
        devices=tuple(_device(item, f"devices[{index}].") for index, item in enumerate(devices)),
    )
    kv.done()
    reader.done()
    return found


def _device(item: object, prefix: str) -> Device:
    reader = _Table(item, prefix)
    memory = _Table(reader.take("memory", dict), f"{prefix}memory.")
    device = Device(
        name=reader.take("name", str),
        memory_kind=memory.take("kind", str),
        memory_gb=memory.positive("gb"),
        memory_gb_per_s=memory.positive("gb_per_s"),
        tflops=reader.positive("tflops"),
        watts=reader.positive("watts"),
        price_usd=reader.span("price_usd"),
        usd_per_hour=reader.span("usd_per_hour"),
        source=reader.take("source", str),
    )
    memory.done()
    reader.done()
    return device


class _Table:
    """Takes keys out of a table one at a time, then makes sure that none is left."""

    def __init__(self, table: object, prefix: str) -> None:
        if not isinstance(table, dict):
            raise TypeError(f"{prefix.rstrip('.')} must be a table")
        self._left: dict[str, Any] = dict(table)
        self._prefix = prefix

    def take(self, key: str, kind: type[Wanted], *, default: Wanted | None = None) -> Wanted:
        value = self._left.pop(key, default)
        if value is None:
            raise ValueError(f"{self._prefix}{key} is missing")
        if not isinstance(value, kind):
            raise TypeError(f"{self._prefix}{key} must be of type {kind.__name__}, not {type(value).__name__}")
        return value

    def positive(self, key: str) -> float:
        return _positive(self._left.pop(key, None), f"{self._prefix}{key}")

    def span(self, key: str) -> tuple[float, float] | None:
        value = self._left.pop(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"{self._prefix}{key} must be [lowest, highest]")
        low, high = (_positive(part, f"{self._prefix}{key}") for part in value)
        if low > high:
            raise ValueError(f"{self._prefix}{key} must be [lowest, highest]")
        return low, high

    def done(self) -> None:
        if self._left:
            raise ValueError(f"unknown key {self._prefix}{next(iter(self._left))}")


def _positive(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{key} must be a positive number")
    return float(value)
