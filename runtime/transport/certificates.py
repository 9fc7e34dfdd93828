"""The certificates by which roles know each other: what a role has in its folder, and checks.

A certificate names a role in its subject alternative name, and only that counts. Its common name
tells clients apart, in limits, logs and stores, whatever it says. `transport.authority` makes them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import NameOID

from mergec.runtime.core.errors import MergecError
from mergec.runtime.core.spec import ROLES

AUTHORITY, CERTIFICATE, KEY = "authority.pem", "certificate.pem", "key.pem"
"""The files that a role needs, in one folder; KEY is secret."""

REVOKED = "revoked.pem"
"""A list of revoked certificates, signed by the authority; a role need not have one."""

ROLE_URI = "mergec:role:"
"""A certificate names its role in a subject alternative name of this form."""

_SOON = timedelta(days=14)


def check_certificate(
    folder: Path, role: str, now: datetime | None = None, revoked: Path | None = None
) -> str:
    """Check a role's folder. Returns a warning, or an empty string.

    revoked: list of revoked certificates; default: the one in the folder, if any. Raises
    MergecError if the folder cannot be used: a file is missing or malformed, the key, the authority
    or the role does not match, or a certificate is not valid now or was revoked.
    """
    now = now or datetime.now(UTC)
    authority, certificate = read_certificate(folder / AUTHORITY), find_certificate(folder)
    key = read_key(folder / KEY)
    if key.public_key() != certificate.public_key():
        raise MergecError(f"{folder}: the key does not match the certificate; run `mergec certs`")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise MergecError(
            f"{folder / CERTIFICATE}: is not signed by the authority beside it; run `mergec certs`"
        ) from error
    found = role_of(certificate)
    if found != role:
        raise MergecError(
            f"{folder / CERTIFICATE}: is for the role {found or 'none'}, but this party is the "
            f"{role}; give the {role}'s folder"
        )
    for file, checked in ((folder / CERTIFICATE, certificate), (folder / AUTHORITY, authority)):
        if now < checked.not_valid_before_utc:
            raise MergecError(
                f"{file}: is valid from {checked.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, but the "
                f"clock here says {now:%Y-%m-%d %H:%M}; set the clock"
            )
        if now > checked.not_valid_after_utc:
            raise MergecError(
                f"{file}: expired on {checked.not_valid_after_utc:%Y-%m-%d}; run `mergec certs` "
                "for a new folder"
            )
    listed = revoked or revoked_in(folder)
    if listed is not None:
        found_there = read_revoked(listed, authority)
        if found_there.get_revoked_certificate_by_serial_number(certificate.serial_number):
            raise MergecError(
                f"{folder / CERTIFICATE}: was revoked, as {listed} says; ask the authority for "
                "another one"
            )
    if os.name == "posix" and (folder / KEY).stat().st_mode & 0o077:
        return f"{folder / KEY}: other users can read it; run `chmod 600`"
    left = certificate.not_valid_after_utc - now
    if left < _SOON:
        return f"{folder / CERTIFICATE}: expires in {left.days} days"
    return ""


UNREADABLE = (
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
    ValueError,
)
"""What `cryptography` raises for parts of a certificate or a request that it cannot read."""


def find_folder(certificates: Path, role: str) -> Path:
    """The folder of `role` in a folder that contains those of all roles, or this folder itself.

    Raises MergecError if it contains the folders of several clients.
    """
    inner = certificates / role
    try:
        if inner.is_dir() or (certificates / CERTIFICATE).exists() or not certificates.is_dir():
            return inner if inner.is_dir() else certificates
        inside = sorted(certificates.iterdir())
        folders = [place for place in inside if (place / CERTIFICATE).exists()]
    except OSError as error:
        raise _unreadable(certificates, error) from error
    found = [place for place in folders if role_of(find_certificate(place)) == role]
    if len(found) > 1:
        names = ", ".join(place.name for place in found)
        raise MergecError(
            f"{certificates}: has certificates for several parties of the role {role} ({names}); "
            "give the folder of one of them"
        )
    return found[0] if found else certificates


def find_certificate(folder: Path) -> x509.Certificate:
    """The certificate in a role's folder; raises MergecError if there is none."""
    return read_certificate(folder / CERTIFICATE)


def revoked_in(folder: Path) -> Path | None:
    """The list of revoked certificates in a role's folder, if there is one.

    A link that leads nowhere, or a file that cannot be read, is one too: it has to be an error.
    """
    return folder / REVOKED if os.path.lexists(folder / REVOKED) else None


def read_revoked(file: Path, authority: x509.Certificate) -> x509.CertificateRevocationList:
    """Read a list of revoked certificates.

    Raises MergecError unless the file holds one list, signed by the authority, and nothing else.
    """
    try:
        data = file.read_bytes()
        found = x509.load_pem_x509_crl(data)
        if data.split() != found.public_bytes(serialization.Encoding.PEM).split():
            raise ValueError("there is something else in the file")
        valid = found.issuer == authority.subject and found.is_signature_valid(
            authority.public_key()  # type: ignore[arg-type]
        )
    except OSError as error:
        raise MergecError(
            f"{file}: cannot be read ({error.strerror}); `mergec certs revoke` writes it"
        ) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise MergecError(
            f"{file}: is not a list of revoked certificates alone; `mergec certs revoke` writes it"
        ) from error
    if not valid:
        raise MergecError(
            f"{file}: is not signed by the authority of this party; use the list of that authority"
        )
    return found


def fingerprint(public: PublicKeyTypes) -> str:
    """SHA-256 of a public key (of its SubjectPublicKeyInfo, as in RFC 7469), in hexadecimal.

    It stays the same when a certificate is renewed for the same key, and the machine that makes the
    key can show it before anybody signs.
    """
    encoded = public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashes.Hash(hashes.SHA256())
    digest.update(encoded)
    return digest.finalize().hex()


def read_fingerprints(texts: Sequence[str]) -> frozenset[str]:
    """Fingerprints as a person gives them: colons, spaces and capitals do not matter.

    Raises MergecError for what is not one.
    """
    found = set()
    for text in texts:
        plain = text.replace(":", "").replace(" ", "").lower()
        if len(plain) != 64 or not set(plain) <= set("0123456789abcdef"):
            raise MergecError(
                f"{text[:80]!r} is not a fingerprint of 64 hexadecimal digits; `mergec certs show` "
                "prints that of a certificate"
            )
        found.add(plain)
    return frozenset(found)


def name_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The common name, or an empty string."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def role_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The role that a certificate or a request names, or an empty string."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except UNREADABLE:
        return ""
    found = [
        uri.removeprefix(ROLE_URI)
        for uri in names.get_values_for_type(x509.UniformResourceIdentifier)
        if uri.startswith(ROLE_URI)
    ]
    return found[0] if len(found) == 1 and found[0] in ROLES else ""


def read_key(file: Path) -> PrivateKeyTypes:
    """Read a private key; raises MergecError if there is none."""
    try:
        return serialization.load_pem_private_key(file.read_bytes(), None)
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise MergecError(f"{file}: is not a private key; run `mergec certs`") from error


def read_certificate(file: Path) -> x509.Certificate:
    """Read a certificate; raises MergecError if there is none."""
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except OSError as error:
        raise _unreadable(file, error) from error
    except ValueError as error:
        raise MergecError(f"{file}: is not a certificate; run `mergec certs`") from error


def _unreadable(file: Path, error: OSError) -> MergecError:
    return MergecError(f"{file}: cannot be read ({error.strerror}); run `mergec certs`")
