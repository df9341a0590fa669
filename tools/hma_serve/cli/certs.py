"""`hma-serve certs DIR`: an authority of one's own and a certificate for the services, to try mutual TLS.

For production let the platform issue certificates (docs/deploy.md): here the authority's private key lies in the same
directory. Called again, it renews the certificate with the same authority, and running services take it up.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.rpc import CA_FILE, CERTIFICATE_FILE, KEY_FILE, SERVICE_NAME

_CA_KEY_FILE = "ca.key"
_MAX_DAYS = 3650
# Clocks of a cluster differ a little.
_EARLIER = datetime.timedelta(minutes=5)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="hma-serve certs",
        description=f"Make {CA_FILE}, {CERTIFICATE_FILE} and {KEY_FILE} for --tls-dir, and the authority that signs.",
        epilog="Again in the same directory: renews the certificate, keeps the authority.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="HOST|IP",
        help="a name by which clients reach the router, beside localhost and this host's; may be repeated",
    )
    parser.add_argument("--days", type=int, default=30, help="how long the certificate is valid (default: 30)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Makes or renews the files; returns the exit status.

    Raises:
        HmaError: The directory cannot be used, or an argument is wrong.
    """
    args = build_parser().parse_args(argv)
    if not 1 <= args.days <= _MAX_DAYS:
        raise InvalidArgument(f"--days must be between 1 and {_MAX_DAYS}, not {args.days}", field="--days")
    names = [SERVICE_NAME, "localhost", "127.0.0.1", "::1", socket.gethostname(), *args.name]
    alternatives = [_alternative(name) for name in dict.fromkeys(names)]
    try:
        write_certificates(args.directory, alternatives, datetime.timedelta(days=args.days))
    except OSError as exc:
        raise FailedPrecondition(f"cannot write to {args.directory}: {exc.strerror}", field="DIR") from exc
    print(f"{args.directory}: {CA_FILE}, {CERTIFICATE_FILE} and {KEY_FILE}, valid for {args.days} days")
    print(f"  services  --tls-dir {args.directory}")
    files = (CA_FILE, CERTIFICATE_FILE, KEY_FILE)
    ca, certificate, key = (args.directory / name for name in files)
    print(f"  clients   --tls-ca {ca} --tls-cert {certificate} --tls-key {key}")
    return 0


def write_certificates(directory: Path, names: Sequence[x509.GeneralName], valid: datetime.timedelta) -> None:
    """Makes the authority if there is none, then a certificate and its key.

    Raises:
        OSError: The directory cannot be written.
        FailedPrecondition: There is an authority that is not ours to use.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority, authority_key = _authority(directory, valid)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _certificate("hma-serve", key.public_key(), authority.subject, valid)
    certificate = (
        builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write(directory / KEY_FILE, _pem(key), mode=0o600)
    _write(directory / CERTIFICATE_FILE, certificate.public_bytes(serialization.Encoding.PEM))


def _authority(directory: Path, valid: datetime.timedelta) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The directory's authority, made if the directory has none."""
    path, key_path = directory / CA_FILE, directory / _CA_KEY_FILE
    if path.exists():
        try:
            key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError, TypeError) as exc:
            raise FailedPrecondition(
                f"{path} is there but its key {key_path} is not, or cannot be read: choose another directory",
                field="DIR",
            ) from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise FailedPrecondition(f"{key_path} is not the key of {path}: choose another directory", field="DIR")
        return certificate, key
    key = ec.generate_private_key(ec.SECP256R1())
    common_name = "hma-serve development authority"
    builder = _certificate(common_name, key.public_key(), _name(common_name), valid * 10)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_signs_certificates(), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(key_path, _pem(key), mode=0o600)
    _write(path, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate, key


def _certificate(
    common_name: str, key: ec.EllipticCurvePublicKey, issuer: x509.Name, valid: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + valid)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _signs_certificates() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    if not name or not name.isascii() or any(c.isspace() or c in "/:" for c in name):
        raise InvalidArgument(f"--name {name!r} is neither a host name nor an IP address", field="--name")
    return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replaces the file at once: a reader sees the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    part.replace(path)
