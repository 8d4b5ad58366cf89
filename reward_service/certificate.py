"""A certificate for one run, so that its scores do not travel in clear and no other service can
pretend to be the one that the run started."""

from __future__ import annotations

import datetime
import secrets

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from reward_service.access import Access, Tls

NAME = "reward.accord.invalid"  # the address is not known yet when the certificate is made
VALID = datetime.timedelta(days=3650)  # a run ends before, and its key is nowhere on disk
CLOCKS_DIFFER = datetime.timedelta(days=1)


def run_access(*, encrypted: bool) -> tuple[Access, Access]:
    """(the service's, its clients') with a new token; ``encrypted``: and a new certificate, which
    signs itself and is all that the clients trust."""
    token = secrets.token_urlsafe(32)
    if not encrypted:
        return Access(token=token), Access(token=token)
    certificate, key = _self_signed()
    return (
        Access(token=token, tls=Tls(certificate=certificate, key=key)),
        Access(token=token, tls=Tls(ca=certificate, name=NAME)),
    )


def _self_signed() -> tuple[bytes, bytes]:
    """(certificate, key), PEM. Elliptic curve P-256: made in a millisecond."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return certificate.public_bytes(pem), key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
