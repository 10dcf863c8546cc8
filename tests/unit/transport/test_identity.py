"""A host's certificate and key."""

from __future__ import annotations

import base64
import datetime
import hashlib
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509

from transport.api import TransportError
from transport.identity import Identity, create_identity, fingerprint, load_or_create_identity


def test_an_identity_survives_saving_in_a_file_for_the_owner_alone(tmp_path: Path) -> None:
    identity = create_identity("host1")
    path = tmp_path / "new" / "identity.pem"
    identity.save(path)
    assert Identity.load(path) == identity
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["identity.pem"]


def test_an_identity_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    first = create_identity("host1")
    first.save(path)
    with pytest.raises(FileExistsError):
        create_identity("host1").save(path)
    assert load_or_create_identity(path, "host1") == first


def test_of_several_that_come_first_at_once_all_get_the_same(tmp_path: Path) -> None:
    got: list[Identity] = []
    threads = [
        threading.Thread(target=lambda: got.append(load_or_create_identity(tmp_path / "identity.pem", "host1")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert len(set(got)) == 1


@pytest.mark.parametrize("content", ["", "garbage", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_damaged_file_is_an_error_with_a_hint(tmp_path: Path, content: str) -> None:
    path = tmp_path / "identity.pem"
    path.write_text(content)
    with pytest.raises(TransportError, match="does not hold") as caught:
        Identity.load(path)
    assert caught.value.hint


def test_the_key_is_not_shown() -> None:
    assert "PRIVATE" not in repr(create_identity("host1"))


def test_a_certificate_is_valid_on_a_host_whose_clock_is_behind_and_for_decades() -> None:
    certificate = x509.load_pem_x509_certificate(create_identity("x" * 100).cert_pem.encode())
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc < now - datetime.timedelta(hours=23)
    assert certificate.not_valid_after_utc > now + datetime.timedelta(days=50 * 365)


def test_a_fingerprint_is_that_of_the_certificate() -> None:
    pem = create_identity("host1").cert_pem
    digest = base64.b64encode(hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest()).decode()
    assert fingerprint(pem) == "SHA256:" + digest.rstrip("=")
    with pytest.raises(TransportError, match="not a certificate"):
        fingerprint("garbage")
