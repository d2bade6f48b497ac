"""A certificate authority for tests of servers and clients with TLS."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Authority:
    """A certificate authority with its files in a folder."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    name: x509.Name

    @classmethod
    def make(cls, folder: Path) -> Authority:
        folder.mkdir()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        found = cls(folder, ec.generate_private_key(ec.SECP256R1()), name)
        found._write("ca", name, found.key, ca=True)
        return found

    def issue(self, file: str, address: str = "127.0.0.1", key: Key | None = None) -> None:
        """Write FILE.pem and FILE.key for a server with an IP address or DNS name, or for a client. key: None: new."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, file)])
        self._write(file, name, key or ec.generate_private_key(ec.SECP256R1()), address=address)

    def _write(self, file: str, name: x509.Name, key: Key, *, ca: bool = False, address: str = "") -> None:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder().subject_name(name).issuer_name(self.name).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )  # fmt: skip
        if address:
            is_name = address[-1].isalpha()
            shown = x509.DNSName(address) if is_name else x509.IPAddress(ipaddress.ip_address(address))
            builder = builder.add_extension(x509.SubjectAlternativeName([shown]), critical=False)
        pem = builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        (self.folder / f"{file}.pem").write_bytes(pem)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (self.folder / f"{file}.key").write_bytes(private)
