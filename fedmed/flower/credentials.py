"""Throw-away certificates and node keys for a deployment on one machine.

Institutions get theirs from their own authority; these live as long as one run, in a
folder that nobody else may read.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from fedmed.message import SiteId

LIFETIME = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Credentials:
    """Files of one authority, one server and one key pair per site.

    Attributes:
        node_keys: Site -> private key; the public one lies beside it as ".pub".
    """

    authority: Path
    certificate: Path
    key: Path
    node_keys: Mapping[SiteId, Path]


def make_credentials(folder: Path, site_ids: tuple[SiteId, ...]) -> Credentials:
    """Write fresh credentials for 127.0.0.1 into a folder.

    Args:
        folder: Is created, for this user only.
        site_ids: Each gets a key pair, SECP384R1 in OpenSSH format as Flower asks.
    """
    folder.mkdir(mode=0o700)
    authority_key = ec.generate_private_key(ec.SECP384R1())
    server_key = ec.generate_private_key(ec.SECP384R1())
    authority = certificate("fedmed loopback authority", authority_key, authority_key)
    server = certificate("127.0.0.1", server_key, authority_key)
    nodes = {}
    for number, site_id in enumerate(sorted(site_ids)):
        nodes[site_id] = write_node_key(folder / f"node{number}")
    return Credentials(
        write(folder / "ca.crt", authority.public_bytes(Encoding.PEM)),
        write(folder / "server.pem", server.public_bytes(Encoding.PEM)),
        write(folder / "server.key", private_bytes(server_key, PrivateFormat.PKCS8)),
        nodes,
    )


def certificate(
    name: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    """Make a certificate; of an authority if it signs itself."""
    is_authority = key is signer
    issuer = name if is_authority else "fedmed loopback authority"
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(common_name(name))
        .issuer_name(common_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
    )
    if not is_authority:
        address = x509.IPAddress(ipaddress.ip_address(name))
        names = x509.SubjectAlternativeName([address, x509.DNSName("localhost")])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer, hashes.SHA384())


def common_name(name: str) -> x509.Name:
    """Give a subject that has nothing but a name."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def write_node_key(path: Path) -> Path:
    """Write a key pair, the public half beside the private one."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write(path.with_suffix(".pub"), public)
    return write(path, private_bytes(key, PrivateFormat.OpenSSH))


def private_bytes(key: ec.EllipticCurvePrivateKey, style: PrivateFormat) -> bytes:
    """Give a private key as text, unencrypted."""
    return key.private_bytes(Encoding.PEM, style, NoEncryption())


def write(path: Path, content: bytes) -> Path:
    """Write a file that only this user may read."""
    path.touch(mode=0o600)
    path.write_bytes(content)
    return path
