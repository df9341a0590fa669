"""The SDK over TLS, with and without a certificate of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import grpc
import pytest

from hma_serve.client import AsyncClient, Client, RetryPolicy, Tls, Unavailable
from support.fake_inference import FakeRouter


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    directory = tmp_path_factory.mktemp("pem")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subject = ["-subj", "/CN=router", "-addext", "subjectAltName=IP:127.0.0.1"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", *curve, *subject, *files], check=True, capture_output=True)
    return certificate, key


def credentials(pem: tuple[Path, Path], *, mutual: bool) -> grpc.ServerCredentials:
    certificate, key = (path.read_bytes() for path in pem)
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=certificate if mutual else None, require_client_auth=mutual
    )


async def test_the_authority_given_is_trusted(pem: tuple[Path, Path]) -> None:
    with FakeRouter(credentials(pem, mutual=False)) as router:
        with Client(router.address, tls=Tls(ca=pem[0])) as client:
            assert client.models()
        async with AsyncClient(router.address, tls=Tls(ca=pem[0])) as aclient:
            assert await aclient.models()


def test_an_unknown_authority_is_not(pem: tuple[Path, Path]) -> None:
    with (
        FakeRouter(credentials(pem, mutual=False)) as router,
        Client(router.address, tls=Tls(), retry=RetryPolicy(rounds=1)) as client,
        pytest.raises(Unavailable, match="no connection"),
    ):
        client.models()


def test_a_certificate_is_shown_where_one_is_asked_for(pem: tuple[Path, Path]) -> None:
    certificate, key = pem
    with FakeRouter(credentials(pem, mutual=True)) as router:
        with Client(router.address, tls=Tls(ca=certificate, certificate=certificate, key=key)) as client:
            assert client.models()
        with (
            Client(router.address, tls=Tls(ca=certificate), retry=RetryPolicy(rounds=1)) as client,
            pytest.raises(Unavailable),
        ):
            client.models()
