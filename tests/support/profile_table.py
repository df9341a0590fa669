"""The table of profiles in docs/accelerators.md, made from the files of data."""

from __future__ import annotations

from hma_serve.prefill.profile_file import Device
from hma_serve.prefill.profiles import PROFILES, Profile


def profile_table() -> str:
    """Two tables in Markdown: what profiles compute, and the devices that follow them."""
    profiles = ["| profile | weights | activations | residual | keys | values |", "| --- " * 6 + "|"]
    profiles += [_row(one) for one in PROFILES.values()]
    devices = [
        "| profile | device | memory | TFLOP/s | W | price, $ | rent, $/h | source |",
        "| --- " * 8 + "|",
    ]
    devices += [_device(one.name, device) for one in PROFILES.values() for device in one.devices]
    return "\n".join([*profiles, "", *devices, ""])


def _row(one: Profile) -> str:
    return _cells(*(f"`{part}`" for part in (one.name, one.weights, one.activations)), one.compute, *_codecs(one))


def _codecs(one: Profile) -> tuple[str, str]:
    return f"`{one.k_codec}`", f"`{one.v_codec}`"


def _device(profile: str, one: Device) -> str:
    memory = f"{one.memory_gb:g} GB {one.memory_kind}, {one.memory_gb_per_s:,g} GB/s"
    price, rent = _span(one.price_usd, ",.0f"), _span(one.usd_per_hour, ".2f")
    return _cells(f"`{profile}`", one.name, memory, f"{one.tflops:,g}", f"{one.watts:g}", price, rent, one.source)


def _span(span: tuple[float, float] | None, form: str) -> str:
    if span is None:
        return ""
    return " to ".join(format(part, form) for part in dict.fromkeys(span))


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
