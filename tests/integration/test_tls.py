"""Mutual TLS on every gRPC port and to etcd, between real processes; without a certificate nothing is answered."""

from __future__ import annotations

import contextlib
import datetime
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hma_serve.cli.certs import main as certs
from hma_serve.cli.certs import write_certificates
from hma_serve.client import Client, RetryPolicy, Tls, Unavailable
from hma_serve.core.errors import FailedPrecondition, HmaError, InvalidArgument
from hma_serve.registry import Tls as EtcdTls
from hma_serve.registry import Watcher, open_store
from hma_serve.rpc import CA_FILE, CERTIFICATE_FILE, KEY_FILE, SERVICE_NAME, ChannelCache, GrpcServer, TlsConfig
from hma_serve.worker import etcd_tls
from support.cluster import Cluster, command, environment, running_cluster
from support.etcd_server import EtcdServer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tls")
    assert certs([str(made)]) == 0
    return made


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of another authority."""
    made = tmp_path_factory.mktemp("stranger")
    assert certs([str(made)]) == 0
    return made


@pytest.fixture(scope="module")
def cluster(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), "--tls-dir", str(directory)) as running:
        yield running


def sdk(cluster: Cluster, tls: Tls | None) -> Client:
    return Client(f"localhost:{cluster.grpc_port}", tls=tls, retry=RetryPolicy(rounds=1), timeout=20)


def files(directory: Path, *, certificate: bool = True) -> Tls:
    if not certificate:
        return Tls(ca=directory / CA_FILE)
    return Tls(ca=directory / CA_FILE, certificate=directory / CERTIFICATE_FILE, key=directory / KEY_FILE)


def health(channel: grpc.Channel) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status)


def ports(cluster: Cluster) -> dict[str, str]:
    """host:port of every gRPC port and of etcd, by who listens."""
    found = {"router": f"127.0.0.1:{cluster.grpc_port}"}
    for line in cluster.lines:
        name, *_, where = line.split() if line.startswith("  ") and len(line.split()) > 2 else ("", "")
        if "gRPC" in line and name.startswith(("prefill-", "decode-")):
            found[name.partition("-")[0]] = where
        if name == "etcd":
            assert where.startswith("https://")
            found["etcd"] = where.removeprefix("https://")
    assert set(found) == {"router", "prefill", "decode", "etcd"}
    return found


def test_a_request_becomes_tokens_over_encrypted_links(cluster: Cluster, directory: Path) -> None:
    with sdk(cluster, files(directory)) as client:
        result = client.generate("The sea was calm and the captain slept. " * 20, max_tokens=4).result()
    assert len(result.token_ids) == 4


def test_top_without_certificates_says_so_in_one_line(cluster: Cluster) -> None:
    asked = command("top", "--etcd", f"https://{ports(cluster)['etcd']}", "--once")
    result = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment(), timeout=30)
    assert result.returncode == 1
    assert result.stderr == (
        "hma-serve top: the registry did not answer within 5 s; check --etcd, which takes etcd's client port "
        "(2379 as a rule), and --tls-dir\n"
    )


def test_a_prompt_over_http_still_goes_through_prefill(cluster: Cluster) -> None:
    body = {"prompt": "The sea was calm. " * 40, "max_tokens": 2}
    assert httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=30).status_code == 200
    assert cluster.metric("prefill", "kv_sent_bytes_total") > 0


@pytest.mark.parametrize("port", ["router", "prefill", "decode", "etcd"])
def test_without_a_certificate_nothing_is_answered(
    cluster: Cluster, directory: Path, stranger: Path, port: str
) -> None:
    """In the clear, encrypted without a certificate, and with one of another authority: no call gets an answer."""
    address = ports(cluster)[port]
    own, foreign = TlsConfig.in_directory(directory), TlsConfig.in_directory(stranger)
    anonymous = grpc.ssl_channel_credentials(own.ca.read_bytes())
    mixed = grpc.ssl_channel_credentials(
        own.ca.read_bytes(), foreign.key.read_bytes(), foreign.certificate.read_bytes()
    )
    named = [("grpc.ssl_target_name_override", SERVICE_NAME)]
    channels = {
        "in the clear": grpc.insecure_channel(address),
        "no certificate": grpc.secure_channel(address, anonymous, named),
        "of another authority": grpc.secure_channel(address, mixed, named),
    }
    for how, channel in channels.items():
        with channel, pytest.raises(grpc.RpcError) as refused:
            health(channel)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, how
    with grpc.secure_channel(address, own.channel_credentials(), named) as channel:
        if port != "etcd":
            assert health(channel) == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("port", ["router", "prefill", "decode", "etcd"])
def test_a_raw_socket_gets_not_a_byte_of_http(cluster: Cluster, directory: Path, port: str) -> None:
    host, _, number = ports(cluster)[port].rpartition(":")
    context = ssl.create_default_context(cafile=str(directory / CA_FILE))
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(number)), timeout=5) as raw:
        raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        raw.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            # A TLS alert (0x15) or a refusal in HTTP/1, never an HTTP/2 frame.
            assert raw.recv(4096)[:1] in (b"", b"\x15", b"H")
    received = b""
    # TLS 1.3 tells a client of a missing certificate at its first read.
    with (
        contextlib.suppress(OSError),
        socket.create_connection((host, int(number)), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname=SERVICE_NAME) as encrypted,
    ):
        encrypted.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        received = encrypted.recv(4096)
    assert received == b""


def test_the_sdk_needs_a_certificate(cluster: Cluster, directory: Path, stranger: Path) -> None:
    for tls in (None, files(directory, certificate=False), files(stranger)):
        with sdk(cluster, tls) as client, pytest.raises(Unavailable):
            client.models()


def test_the_fleet_is_read_with_a_certificate_alone(cluster: Cluster, directory: Path) -> None:
    url = f"https://{ports(cluster)['etcd']}"
    own = TlsConfig.in_directory(directory)
    store = open_store(url, EtcdTls(own.ca, own.certificate, own.key))
    with Watcher(store) as watcher:
        assert watcher.wait_listed_blocking(10)
        assert len(watcher.current.workers) == 2
    store.close()
    unnamed = open_store(url, EtcdTls(own.ca))
    with pytest.raises(HmaError):
        unnamed.check(2)
    unnamed.close()


async def test_replaced_certificates_are_taken_up_without_a_restart(tmp_path: Path) -> None:
    """Both ends renew: old connections go on, new ones show the new certificate, and the old authority is forgotten."""
    assert certs([str(tmp_path)]) == 0
    tls = TlsConfig.in_directory(tmp_path)
    server = GrpcServer("test", "127.0.0.1:0", [], tls=tls)
    address = await server.start()
    cache = ChannelCache(tls=tls)

    async def ask(channel: grpc.aio.Channel) -> int:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        return int(answer.status)

    try:
        with cache.lease(address) as before:
            assert await ask(before) == health_pb2.HealthCheckResponse.SERVING
            (tmp_path / CA_FILE).unlink()
            (tmp_path / "ca.key").unlink()
            assert certs([str(tmp_path)]) == 0
            with cache.lease(address) as after:
                assert after is not before
                assert await ask(after) == health_pb2.HealthCheckResponse.SERVING
            assert await ask(before) == health_pb2.HealthCheckResponse.SERVING
    finally:
        await cache.close()
        await server.stop(0)


async def test_what_has_expired_or_names_another_service_is_refused(tmp_path: Path) -> None:
    """Whichever end shows it. A client is recognised by its authority alone, a server also by its name."""
    assert certs([str(tmp_path / "good")]) == 0
    ours, day = x509.DNSName(SERVICE_NAME), datetime.timedelta(days=1)
    for name, alternative, valid in (
        ("expired", ours, datetime.timedelta(minutes=-1)),
        ("other", x509.DNSName("other.example"), day),
    ):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        write_certificates(tmp_path / name, [alternative], valid)

    async def ask(server_shows: str, client_shows: str) -> grpc.StatusCode:
        server = GrpcServer("test", "127.0.0.1:0", [], tls=TlsConfig.in_directory(tmp_path / server_shows))
        cache = ChannelCache(tls=TlsConfig.in_directory(tmp_path / client_shows))
        try:
            with cache.lease(await server.start()) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code()
        finally:
            await cache.close()
            await server.stop(0)
        return grpc.StatusCode.OK

    for server_shows, client_shows in (("expired", "good"), ("good", "expired"), ("other", "good")):
        assert await ask(server_shows, client_shows) is grpc.StatusCode.UNAVAILABLE
    for client_shows in ("good", "other"):
        assert await ask("good", client_shows) is grpc.StatusCode.OK


def test_the_registrys_client_takes_up_replaced_certificates(tmp_path: Path) -> None:
    """A worker outlives its certificate: it finds an etcd that was restarted under a new authority."""
    made = tmp_path / "tls"
    assert certs([str(made)]) == 0
    tls = EtcdTls(made / CA_FILE, made / CERTIFICATE_FILE, made / KEY_FILE)
    with EtcdServer(tmp_path / "etcd", tls=tls) as etcd:
        store = open_store(etcd.url, tls)
        with Watcher(store) as watcher:
            assert watcher.wait_listed_blocking(10)
            etcd.stop()
            # As in the middle of a replacement: nothing to connect with, and nothing breaks.
            (made / CA_FILE).unlink()
            (made / "ca.key").unlink()
            with pytest.raises(Unavailable):
                store.check(1)
            assert certs([str(made)]) == 0
            etcd.restart()
            store.check(5)
            deadline = time.monotonic() + 15
            while watcher.current.stale_since is not None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        store.close()


def test_an_etcd_may_have_an_authority_of_its_own(tmp_path: Path, directory: Path, stranger: Path) -> None:
    """As a managed one has: with its certificates a worker registers there; the services' own are refused."""
    theirs = EtcdTls(stranger / CA_FILE, stranger / CERTIFICATE_FILE, stranger / KEY_FILE)
    own = TlsConfig.in_directory(directory)
    with EtcdServer(tmp_path / "etcd", tls=theirs) as etcd:
        for tls, accepted in ((etcd_tls(own, stranger), True), (etcd_tls(own), False)):
            store = open_store(etcd.url, tls)
            with contextlib.nullcontext() if accepted else pytest.raises(Unavailable):
                store.check(2)
            store.close()
    alone = tmp_path / "authority-alone"
    alone.mkdir()
    (alone / CA_FILE).write_bytes((stranger / CA_FILE).read_bytes())
    assert etcd_tls(None, alone) == EtcdTls(alone / CA_FILE)
    (alone / CERTIFICATE_FILE).write_bytes(b"")
    with pytest.raises(InvalidArgument, match="needs its key"):
        etcd_tls(None, alone)


def test_a_directory_without_certificates_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"ca\.crt.*hma-serve certs"):
        TlsConfig.in_directory(tmp_path)
    certs([str(tmp_path)])
    (tmp_path / KEY_FILE).write_text("nothing")
    with pytest.raises(InvalidArgument, match=r"tls\.key holds no key in PEM"):
        TlsConfig.in_directory(tmp_path)


def test_an_etcd_in_the_clear_is_refused(directory: Path) -> None:
    own = TlsConfig.in_directory(directory)
    with pytest.raises(InvalidArgument, match="write https://"):
        open_store("http://127.0.0.1:2379", EtcdTls(own.ca, own.certificate, own.key))


def test_certs_renews_with_the_same_authority_and_keeps_keys_private(tmp_path: Path) -> None:
    certs([str(tmp_path), "--name", "llm.example.com", "--name", "10.0.0.9"])
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {CA_FILE, "ca.key", CERTIFICATE_FILE, KEY_FILE}
    assert {path.name: path.stat().st_mode & 0o77 for path in tmp_path.glob("*.key")} == {"ca.key": 0, KEY_FILE: 0}
    certs([str(tmp_path)])
    second = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in first if first[name] != second[name]} == {CERTIFICATE_FILE, KEY_FILE}


def test_certs_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--name"):
        certs([str(tmp_path / "a"), "--name", "two words"])
    with pytest.raises(InvalidArgument, match="--days"):
        certs([str(tmp_path / "a"), "--days", "0"])
    (tmp_path / CA_FILE).write_text("someone else's")
    with pytest.raises(FailedPrecondition, match="choose another directory"):
        certs([str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition, match="cannot write"):
        certs([str(tmp_path / "file")])
