"""Who a host is on `stream://`: a key and a self-signed certificate that others pin as it is. No authority signs it."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from transport.api import TransportError

# A pinned certificate is valid until it is replaced: dates would only add a way to fail years later.
_VALIDITY = datetime.timedelta(days=100 * 365)
# Clocks of two hosts differ.
_BACKDATED = datetime.timedelta(days=1)
_END_OF_CERTIFICATE = "-----END CERTIFICATE-----\n"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Certificate and private key as PEM text."""

    cert_pem: str
    key_pem: str = field(repr=False)

    def save(self, path: Path) -> None:
        """Write both into one file of mode 0600, whole or not at all; raises FileExistsError, never replaces one."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.") as file:
            file.write(self.cert_pem + self.key_pem)
            file.flush()
            os.fsync(file.fileno())
            os.link(file.name, path)

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Raises FileNotFoundError, and TransportError for a file that `save` did not write."""
        cert_pem, end, key_pem = path.read_text().partition(_END_OF_CERTIFICATE)
        if not end or "PRIVATE KEY" not in key_pem:
            raise TransportError(f"{path} does not hold a certificate and a key", hint="remove it; a new one is made")
        return cls(cert_pem=cert_pem + end, key_pem=key_pem)


def create_identity(name: str) -> Identity:
    """A new P-256 key and a certificate for it; `name` is for people who look at the certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    # X.509 allows 64 characters for a common name, a host name may have more.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + _VALIDITY)
        .sign(key, hashes.SHA256())
    )
    return Identity(
        cert_pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
        key_pem=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
    )


def load_or_create_identity(path: Path, name: str) -> Identity:
    """The identity in `path`, made on first use; of several processes that come first at once, all get the same."""
    if not path.exists():
        with contextlib.suppress(FileExistsError):
            create_identity(name).save(path)
    return Identity.load(path)


def certificate_der(cert_pem: str) -> bytes:
    """The certificate's bytes. Raises TransportError when the text is none."""
    try:
        return ssl.PEM_cert_to_DER_cert(cert_pem)
    except ValueError as error:
        raise TransportError(
            f"not a certificate: {error}", hint="run `cmigrate host add` for that host again"
        ) from error


def fingerprint_der(der: bytes) -> str:
    digest = base64.b64encode(hashlib.sha256(der).digest()).decode().rstrip("=")
    return f"SHA256:{digest}"


def fingerprint(cert_pem: str) -> str:
    """`SHA256:` and the base64 digest of the certificate, in the form OpenSSH shows keys."""
    return fingerprint_der(certificate_der(cert_pem))
