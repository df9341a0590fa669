"""What an operator may write after --etcd."""

from __future__ import annotations

from pathlib import Path

import pytest

from hma_serve.core.errors import InvalidArgument
from hma_serve.registry import StaticFileStore, Tls, open_readable_store, open_store
from hma_serve.registry.endpoints import Endpoint, parse_endpoints


@pytest.mark.parametrize(
    ("text", "endpoints"),
    [
        ("http://10.0.0.1:2379", [Endpoint("10.0.0.1:2379", secure=False)]),
        ("etcd-0.etcd:12379", [Endpoint("etcd-0.etcd:12379", secure=False)]),
        ("etcd", [Endpoint("etcd:2379", secure=False)]),
        ("https://etcd/", [Endpoint("etcd:2379", secure=True)]),
        ("http://[::1]:1", [Endpoint("[::1]:1", secure=False)]),
        (" a:1 , https://b:2,a:1,", [Endpoint("a:1", secure=False), Endpoint("b:2", secure=True)]),
    ],
)
def test_endpoints_are_read(text: str, endpoints: list[Endpoint]) -> None:
    assert list(parse_endpoints(text)) == endpoints


@pytest.mark.parametrize(
    "text",
    [
        "",
        " , ",
        "ftp://a:1",
        "http://",
        "http://a:0",
        "http://a:65536",
        "http://a:x",
        "http://a:1/path",
        "http://user@a:1",
        "http://a:1?q",
        "http://a b:1",
        "http://[::1",
        "unix:///tmp/etcd",
        ",".join(f"a:{port}" for port in range(1, 18)),
    ],
)
def test_what_is_no_address_is_refused_by_the_flags_name(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_endpoints(text)
    assert caught.value.field == "--etcd"


def test_a_client_certificate_needs_its_key() -> None:
    with pytest.raises(InvalidArgument, match="needs its key"):
        Tls(certificate=Path("client.pem")).credentials()


def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"nothing\.pem"):
        open_store("https://etcd:2379", Tls(root_ca=tmp_path / "nothing.pem"))


def test_a_worker_cannot_register_in_a_file() -> None:
    with pytest.raises(InvalidArgument, match="static file"):
        open_store("file:/etc/fleet.json")


def test_a_router_can_read_one(tmp_path: Path) -> None:
    (tmp_path / "fleet.json").write_text("[]")
    for url in (f"file:{tmp_path}/fleet.json", f"file://{tmp_path}/fleet.json"):
        store = open_readable_store(url)
        assert isinstance(store, StaticFileStore)
        store.check(1)
        store.close()
