"""Profiles: what an accelerator computes in and what it leaves behind, as data.

A profile fixes every rounding that a prompt's KV goes through, so a retry must use the same one, and a reference that
follows it gets the same bytes. An accelerator decides how; it never decides what. Each is one TOML file: those in
`profile_data` are built in, and a directory named by the user adds others, so a new device needs no code.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType

from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.core.model_config import ModelConfig
from hma_serve.kvblock import KvFormatError, codec
from hma_serve.prefill.profile_file import Device, ProfileFile, read_profile_file

OPERAND_GROUPS: Mapping[str, int] = MappingProxyType(
    {
        "f32": 1,
        "bf16": 1,
        "tt_bfp8": 16,
        "tt_bfp4": 16,
        "fp8_e4m3fn": 1,
        "fp8_e4m3fnuz": 1,
        "fp8_e4m3_ieee": 1,
        "mxfp8_e4m3": 32,
        "mxint8": 32,
        "nvfp4": 16,
        "int8": 1,
    }
)
"""Formats of weights and activations, as `hma_serve.quant.operand_format` defines them, and the features that share a
scale there; 1: a whole row does, or none. Here because a front knows nothing of torch."""

_COMPUTE = ("f32", "bf16")


@dataclass(frozen=True, slots=True)
class Profile:
    """The arithmetic of one kind of prefill.

    Attributes:
        name: What `--profile` and the registry call it.
        weights: Format of every linear layer's weight, one of `OPERAND_GROUPS`.
        activations: Format of what enters a linear layer, likewise.
        compute: Dtype of the residual stream, of norms and of what leaves a linear layer: `f32` or `bf16`.
        k_codec: Wire codec of keys, which attention reads as stored.
        v_codec: Wire codec of values, likewise.
        devices: Hardware that runs it, with rates in this profile's arithmetic; for people and planners.
    """

    name: str
    weights: str
    activations: str
    compute: str
    k_codec: str
    v_codec: str
    devices: tuple[Device, ...] = ()

    def check(self, model: ModelConfig, ranks: int = 1) -> None:
        """Refuses a model whose sizes the formats cannot hold, or that so many ranks cannot share.

        Raises:
            FailedPrecondition: Names the size at fault.
        """
        for role, name in (("K", self.k_codec), ("V", self.v_codec)):
            try:
                codec(name).check_geometry(model.head_dim)
            except KvFormatError as exc:
                raise FailedPrecondition(
                    f"profile {self.name} does not fit this model: {role} codec {name}: {exc}", field="--profile"
                ) from exc
        for operand in (self.weights, self.activations):
            group = OPERAND_GROUPS[operand]
            for name, size in _grouped_sizes(model).items():
                if size % group:
                    raise FailedPrecondition(
                        f"profile {self.name} does not fit this model: {name} is {size}, not a multiple of {group}, "
                        f"the group of {operand}",
                        field="--profile",
                    )
        self._check_ranks(model, ranks)

    def _check_ranks(self, model: ModelConfig, ranks: int) -> None:
        if ranks > model.num_kv_heads:
            raise FailedPrecondition(
                f"--tp {ranks} asks for more ranks than the {model.num_kv_heads} key/value heads of this model; "
                "a rank needs at least one",
                field="--tp",
            )
        group = OPERAND_GROUPS[self.activations]
        for name, size, unit in (
            ("num_key_value_heads", model.num_kv_heads, 1),
            ("num_attention_heads", model.num_heads, 1),
            ("num_attention_heads x head_dim", model.q_size, group),
            ("intermediate_size", model.intermediate_size, group),
        ):
            if size % (ranks * unit):
                parts = "parts" if unit == 1 else f"multiples of {unit}, the group of {self.activations}"
                raise FailedPrecondition(
                    f"{name} is {size}, which {ranks} ranks cannot share in equal {parts}", field="--tp"
                )


def _grouped_sizes(model: ModelConfig) -> Mapping[str, int]:
    """Every dimension along which weights or activations form groups."""
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads x head_dim": model.q_size,
        "num_key_value_heads x head_dim": model.kv_size,
    }


def load_profiles(directory: Path | None = None) -> Mapping[str, Profile]:
    """Every profile by name: the built-in ones, then the directory's.

    Args:
        directory: Holds more `*.toml` files; None: none.

    Raises:
        InvalidArgument: The directory or a file in it cannot be read, is not a profile, or takes a name again.
    """
    profiles = dict(_built_in())
    for profile in () if directory is None else _in_directory(directory):
        if profile.name in profiles:
            raise InvalidArgument(
                f"{directory}: a profile named {profile.name!r} is there already; choose another name",
                field="--profiles",
            )
        profiles[profile.name] = profile
    return MappingProxyType(profiles)


def find_profile(name: str, directory: Path | None = None) -> Profile:
    """The profile of that name.

    Args:
        name: Which one.
        directory: As `load_profiles`.

    Raises:
        InvalidArgument: There is none; the message lists those there are. Or as `load_profiles`.
    """
    profiles = load_profiles(directory)
    try:
        return profiles[name]
    except KeyError:
        raise InvalidArgument(
            f"unknown profile {name!r}; choose one of {', '.join(profiles)}", field="--profile"
        ) from None


@cache
def _built_in() -> Mapping[str, Profile]:
    return {profile.name: profile for profile in _read(files("hma_serve.prefill").joinpath("profile_data").iterdir())}


def _in_directory(directory: Path) -> Iterator[Profile]:
    try:
        entries = list(directory.iterdir())
    except OSError as exc:
        raise InvalidArgument(f"cannot read profiles from {directory}: {exc.strerror}", field="--profiles") from exc
    yield from _read(entries)


def _read(entries: Iterable[Traversable]) -> Iterator[Profile]:
    for entry in sorted(entries, key=lambda entry: entry.name):
        if not entry.name.endswith(".toml"):
            continue
        try:
            yield _profile(read_profile_file(tomllib.loads(entry.read_text(encoding="utf-8"))))
        except (OSError, TypeError, ValueError) as exc:
            raise InvalidArgument(f"{entry} is not a profile: {exc}", field="--profiles") from exc


def _profile(data: ProfileFile) -> Profile:
    """Checks that every name in the file is known.

    Raises:
        ValueError: Says which is not.
    """
    for role, operand in (("weights", data.weights), ("activations", data.activations)):
        if operand not in OPERAND_GROUPS:
            raise ValueError(f"{role} {operand!r}: choose one of {', '.join(OPERAND_GROUPS)}")
    if data.compute not in _COMPUTE:
        raise ValueError(f"compute {data.compute!r}: choose one of {', '.join(_COMPUTE)}")
    for name in (data.k_codec, data.v_codec):
        try:
            codec(name)
        except KvFormatError as exc:
            raise ValueError(f"kv codec {name!r}: {exc}") from exc
    return Profile(data.name, data.weights, data.activations, data.compute, data.k_codec, data.v_codec, data.devices)


PROFILES: Mapping[str, Profile] = _built_in()
"""Every built-in profile by name."""
