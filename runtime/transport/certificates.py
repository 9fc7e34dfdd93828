"""A private certificate authority, and the certificates that identify roles."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mergec.runtime.core.errors import MergecError
from mergec.runtime.core.spec import CLIENT, ROLES

AUTHORITY, CERTIFICATE, KEY = "authority.pem", "certificate.pem", "key.pem"
"""The files that a role needs, in one folder; KEY is secret."""

AUTHORITY_KEY = "authority-key.pem"
"""The authority's private key. Whoever has it can issue a certificate for any role."""

ROLE_URI = "mergec:role:"
"""A certificate names its role in a subject alternative name of this form."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,40}")
_BACKDATED = timedelta(minutes=5)
_SOON = timedelta(days=14)


def make_certificates(
    folder: Path,
    clients: tuple[str, ...] = ("client",),
    days: int = 365,
    now: datetime | None = None,
) -> list[Path]:
    """Create what is missing in `folder`: an authority, and folders of server, dealer and clients.

    Certificates are valid for `days` from `now`. Limits and logs refer to a client by its name. An
    existing authority is reused to sign further clients. Returns the folders created. Raises
    MergecError for an invalid client name, or if `folder` cannot be written.
    """
    for name in clients:
        if not _NAME.fullmatch(name) or name in ROLES[CLIENT + 1 :]:
            raise MergecError(
                f"{name!r} cannot name a client; use up to 40 letters, digits, dots and dashes"
            )
    made = []
    now = now or datetime.now(UTC)
    valid = (now - _BACKDATED, now + timedelta(days=days))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        authority, authority_key = _authority(folder, valid)
        roles = {name: name for name in ROLES[CLIENT + 1 :]} | dict.fromkeys(clients, ROLES[CLIENT])
        for name, role in roles.items():
            place = folder / name
            if (place / CERTIFICATE).exists():
                continue
            place.mkdir(exist_ok=True)
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = _sign(name, role, key.public_key(), authority, authority_key, valid)
            _write(place / AUTHORITY, authority.public_bytes(serialization.Encoding.PEM))
            _write(place / KEY, _private(key), secret=True)
            _write(place / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
            made.append(place)
    except OSError as error:
        raise MergecError(
            f"{folder}: cannot be written ({error.strerror}); choose another place"
        ) from error
    return made


def check_certificate(folder: Path, role: str, now: datetime | None = None) -> str:
    """Check a role's folder. Returns a warning, or an empty string.

    Raises MergecError if the folder cannot be used: a file is missing or malformed, the key, the
    authority or the role does not match, or a certificate is not valid now.
    """
    now = now or datetime.now(UTC)
    authority, certificate = _read(folder / AUTHORITY), _read(folder / CERTIFICATE)
    try:
        key = serialization.load_pem_private_key((folder / KEY).read_bytes(), None)
    except OSError as error:
        raise _unreadable(folder / KEY, error) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise MergecError(f"{folder / KEY}: is not a private key; run `mergec certs`") from error
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
    if os.name == "posix" and (folder / KEY).stat().st_mode & 0o077:
        return f"{folder / KEY}: other users can read it; run `chmod 600`"
    left = certificate.not_valid_after_utc - now
    if left < _SOON:
        return f"{folder / CERTIFICATE}: expires in {left.days} days"
    return ""


def role_of(certificate: x509.Certificate) -> str:
    """The role that a certificate names, or an empty string."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ""
    found = [
        uri.removeprefix(ROLE_URI)
        for uri in names.get_values_for_type(x509.UniformResourceIdentifier)
        if uri.startswith(ROLE_URI)
    ]
    return found[0] if len(found) == 1 and found[0] in ROLES else ""


def _authority(
    folder: Path, valid: tuple[datetime, datetime]
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    if (folder / AUTHORITY).exists():
        certificate = _read(folder / AUTHORITY)
        try:
            key = serialization.load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise MergecError(f"{folder / AUTHORITY_KEY}: is not a private key") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise MergecError(f"{folder / AUTHORITY_KEY}: is not the key of this authority")
        return certificate, key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mergec authority")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(folder / AUTHORITY_KEY, _private(key), secret=True)
    _write(folder / AUTHORITY, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate, key


def _sign(
    name: str,
    role: str,
    public: ec.EllipticCurvePublicKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    valid: tuple[datetime, datetime],
) -> x509.Certificate:
    alternative = [x509.UniformResourceIdentifier(ROLE_URI + role)]
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(authority.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(min(valid[1], authority.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(file: Path, data: bytes, *, secret: bool = False) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with os.fdopen(os.open(file, flags, 0o600 if secret else 0o644), "wb") as out:
        out.write(data)


def _read(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except OSError as error:
        raise _unreadable(file, error) from error
    except ValueError as error:
        raise MergecError(f"{file}: is not a certificate; run `mergec certs`") from error


def _unreadable(file: Path, error: OSError) -> MergecError:
    return MergecError(f"{file}: cannot be read ({error.strerror}); run `mergec certs`")
