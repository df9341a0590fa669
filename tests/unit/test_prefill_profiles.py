"""Profiles are data: the built-in files, a user's directory, and the sentences for what cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from hma_serve import quant
from hma_serve.checkpoint import read_model_config
from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.prefill.profiles import OPERAND_GROUPS, PROFILES, Profile, find_profile, load_profiles
from support.profile_table import profile_table
from support.tiny_qwen3 import make_tiny_checkpoint

ABACUS = """
name = "abacus"
weights = "int8"
activations = "int8"
compute = "f32"
kv = { k = "mxint8", v = "int8" }

[[devices]]
name = "Abacus One"
memory = { kind = "wood", gb = 1, gb_per_s = 2.5 }
tflops = 0.1
watts = 1
price_usd = [9, 10]
source = "a flea market"
"""


def write(directory: Path, text: str, name: str = "one.toml") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)
    return directory


def test_the_built_in_profiles() -> None:
    assert sorted(PROFILES) == [
        "bf16",
        "f32",
        "fp8_e4m3",
        "fp8_e4m3fnuz",
        "gaudi_fp8",
        "int8",
        "mxfp8",
        "mxint8",
        "nvfp4",
        "tt_bfp4_weights",
        "tt_bfp8",
    ]
    tenstorrent = PROFILES["tt_bfp8"]
    assert (tenstorrent.weights, tenstorrent.compute, tenstorrent.k_codec) == ("tt_bfp8", "f32", "tt_bfp8_b")
    p150 = tenstorrent.devices[0]
    assert (p150.memory_kind, p150.tflops, p150.price_usd, p150.watts) == ("GDDR6", 332, (1399, 1399), 300)
    assert all(device.source for profile in PROFILES.values() for device in profile.devices)


def test_the_front_and_the_quantiser_know_the_same_formats() -> None:
    groups = {name: quant.operand_format(name).group for name in quant.operand_format_names()}
    assert groups == dict(OPERAND_GROUPS)


def test_a_file_in_a_directory_adds_a_profile(tmp_path: Path) -> None:
    directory = write(tmp_path / "more", ABACUS)
    write(directory, "not a profile", "README.md")
    added = find_profile("abacus", directory)
    assert (added.k_codec, added.v_codec, added.devices[0].memory_gb_per_s) == ("mxint8", "int8", 2.5)
    assert find_profile("bf16", directory) == PROFILES["bf16"]
    with pytest.raises(InvalidArgument, match="abacus"):
        find_profile("abacus")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('weights = "int8"', 'weights = "int7"'), "weights 'int7': choose one of f32"),
        (('weights = "int8"', "weights = 8"), "weights must be of type str"),
        (('compute = "f32"', 'compute = "f64"'), "compute 'f64'"),
        (('compute = "f32"', ""), "compute is missing"),
        (('v = "int8"', 'v = "int9"'), "kv codec 'int9'"),
        (('v = "int8"', 'v = "int8", w = "int8"'), "unknown key kv.w"),
        (("watts = 1", "watts = -1"), r"devices\[0\].watts must be a positive number"),
        (("watts = 1", "watts = 1\nvolts = 1"), r"unknown key devices\[0\].volts"),
        (("[9, 10]", "[10, 9]"), r"price_usd must be \[lowest, highest\]"),
        (("gb = 1,", "gb = nan,"), "memory.gb must be a positive number"),
        (('name = "abacus"', 'name = "bf16"'), "a profile named 'bf16' is there already"),
        (('name = "abacus"', 'name = "'), "is not a profile"),
    ],
)
def test_a_bad_file_is_refused_by_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    directory = write(tmp_path / "more", ABACUS.replace(*change))
    with pytest.raises(InvalidArgument, match=message):
        load_profiles(directory)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"cannot read profiles from .*nowhere: No such file"):
        load_profiles(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("profile", "sizes", "message"),
    [
        ("tt_bfp8", {"head_dim": 16}, "K codec tt_bfp8_b"),
        ("tt_bfp8", {"head_dim": 32, "intermediate": 72}, "intermediate_size is 72, not a multiple of 16"),
        ("mxfp8", {"head_dim": 32, "hidden": 48}, "hidden_size is 48, not a multiple of 32, the group of mxfp8"),
        ("mxint8", {"head_dim": 48, "hidden": 64, "intermediate": 96}, "K codec mxint8"),
    ],
)
def test_a_profile_that_does_not_fit_names_the_size(
    tmp_path: Path, profile: str, sizes: dict[str, int], message: str
) -> None:
    model = read_model_config(make_tiny_checkpoint(tmp_path / "tiny", **sizes))  # type: ignore[arg-type]
    with pytest.raises(FailedPrecondition, match=message):
        find_profile(profile).check(model)
    find_profile("bf16").check(model)


def test_profiles_are_values() -> None:
    assert PROFILES["int8"] == find_profile("int8")
    assert isinstance(PROFILES["int8"], Profile)


def test_the_table_in_the_docs_is_made_from_the_files() -> None:
    page = (Path(__file__).parents[2] / "docs" / "accelerators.md").read_text()
    assert page.partition("<!-- profiles -->\n")[2].partition("<!-- end of profiles -->")[0] == profile_table()
