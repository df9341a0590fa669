"""The router's command line: what is wrong is told with the flag to change."""

from __future__ import annotations

import pytest

from hma_serve.core.errors import InvalidArgument
from hma_serve.router.config import build_parser, parse_config


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ETCD_ENDPOINTS", raising=False)


def parse(*flags: str) -> object:
    return parse_config(["--etcd", "file:x", *flags])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (":8000", "0.0.0.0:8000"),
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("[::1]:8000", "[::1]:8000"),
        ("localhost:65535", "localhost:65535"),
    ],
)
def test_addresses(given: str, expected: str) -> None:
    config = parse_config(["--etcd", "file:x", "--http-listen", given, "--grpc-listen", given])
    assert (config.http_listen, config.grpc_listen) == (expected, expected)


@pytest.mark.parametrize("flag", ["--http-listen", "--grpc-listen"])
@pytest.mark.parametrize(
    "value", ["", "8000", "host", "host:", "host:http", "host:65536", "::1:8000", "host:-1", "a:²"]
)
def test_odd_addresses_are_refused_by_flag(flag: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=flag) as raised:
        parse(flag, value)
    assert raised.value.field == flag


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize(
    "flag",
    ["--max-waiting", "--max-wait", "--request-timeout", "--max-attempts", "--max-body-bytes", "--max-connections"],
)
def test_limits_must_be_positive(flag: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=flag) as raised:
        parse(f"{flag}={value}")
    assert raised.value.field == flag


@pytest.mark.parametrize("flag", ["--max-wait", "--request-timeout", "--drain-grace"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_times_must_be_finite(flag: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=flag):
        parse(f"{flag}={value}")


def test_without_a_registry_the_ways_to_give_one_are_named() -> None:
    with pytest.raises(InvalidArgument, match=r"--etcd.*ETCD_ENDPOINTS"):
        parse_config([])


def test_every_flag_is_explained() -> None:
    text = build_parser().format_help()
    for action in build_parser()._actions:
        assert action.help, action.option_strings
    for heading in ("model:", "place:", "queue:", "requests:", "process:"):
        assert heading in text


def test_help_says_no_default_where_there_is_none() -> None:
    text = build_parser().format_help()
    assert "(default: None)" not in text
    assert "(default: )" not in text
    assert "(default: 1024)" in text
