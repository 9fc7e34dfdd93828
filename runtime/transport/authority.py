"""A private certificate authority: signs and revokes the certificates that identify roles.

Each machine makes its own key, and a request that the authority signs, so that nobody but its
holder ever has a key. To try things out, `make_certificates` makes all keys in one place.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mergec.runtime.core.errors import MergecError
from mergec.runtime.core.spec import CLIENT, ROLES
from mergec.runtime.transport.certificates import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    REVOKED,
    ROLE_URI,
    UNREADABLE,
    find_certificate,
    fingerprint,
    name_of,
    read_certificate,
    read_key,
    read_revoked,
    revoked_in,
    role_of,
)

AUTHORITY_KEY = "authority-key.pem"
"""The authority's private key. Whoever has it can issue a certificate for any role."""

ISSUED = "issued.jsonl"
"""What the authority has signed: serial number, name and key's fingerprint, one record per line.

A certificate that was renewed is on no machine of the authority's any more, but remains valid.
"""

REQUEST = "request.pem"
"""A request for a certificate, beside the key that it is for."""

FIRST_CLIENT = "client-1"
"""Name of a client to try things out with."""

_AUTHORITY_NAME = "mergec authority"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_BACKDATED = timedelta(minutes=5)


def check_name(name: str) -> None:
    """Raise MergecError unless `name` can name a client; the names of roles cannot."""
    if name.lower() in ROLES:
        raise MergecError(
            f"{name!r} cannot name a client, as it is the name of a role; choose another name"
        )
    if not _NAME.fullmatch(name):
        raise MergecError(
            f"{name!r} cannot name a client; use up to 40 letters, digits, dots and dashes, and "
            "begin with a letter or a digit"
        )


def _subject(role: str, name: str) -> str:
    """The common name of a role's certificate; `name` is a client's, and empty for the others."""
    if role not in ROLES:
        raise MergecError(f"there is no role {role!r}; give one of: {', '.join(ROLES)}")
    if role == ROLES[CLIENT]:
        check_name(name)
        return name
    if name not in ("", role):
        raise MergecError(f"only clients have names; leave out {name!r} for the {role}")
    return role


def make_certificates(
    folder: Path,
    clients: tuple[str, ...] = (FIRST_CLIENT,),
    days: int = 365,
    now: datetime | None = None,
) -> list[Path]:
    """Create what is missing in `folder`: an authority, and folders of server, dealer and clients.

    Certificates are valid for `days` from `now`. Limits and logs refer to a client by its name. An
    existing authority is reused to sign further clients, and anew for certificates that were
    revoked. Returns the folders created. Raises MergecError for an invalid client name, or if
    `folder` cannot be written.
    """
    for name in clients:
        check_name(name)
    made = []
    valid = _validity(days, now)
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        authority, authority_key = _authority(folder, valid)
        revoked = _serials(folder, authority)
        roles = {name: name for name in ROLES[CLIENT + 1 :]} | dict.fromkeys(clients, ROLES[CLIENT])
        for name, role in roles.items():
            place = folder / name
            exists = (place / CERTIFICATE).exists()
            if exists and find_certificate(place).serial_number not in revoked:
                continue
            place.mkdir(exist_ok=True)
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = _sign(name, role, key.public_key(), authority, authority_key, valid)
            _record(folder, [Issued.of(certificate)])
            _write(place / AUTHORITY, _pem(authority))
            _write(place / KEY, _private(key), secret=True)
            _write(place / CERTIFICATE, _pem(certificate))
            made.append(place)
    return made


def make_authority(folder: Path, days: int = 365, now: datetime | None = None) -> Path:
    """Create an authority in `folder`, and nothing else; returns its certificate.

    Raises MergecError if there is one, or if the folder cannot be written.
    """
    if (folder / AUTHORITY).exists():
        raise MergecError(f"{folder / AUTHORITY}: exists; use this authority, or another folder")
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _authority(folder, _validity(days, now))
    return folder / AUTHORITY


def make_request(folder: Path, role: str, name: str = "") -> tuple[Path, str]:
    """Create a key in `folder`, unless it has one, and a request for a certificate for it.

    role, name: what the certificate should say; only a client has a name. Returns the request, and
    the key's fingerprint. Raises MergecError for a wrong role or name, or if the folder cannot be
    written.
    """
    subject = _subject(role, name)
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / KEY).exists():
            _write(folder / KEY, _private(ec.generate_private_key(ec.SECP256R1())), secret=True)
        key = read_key(folder / KEY)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise MergecError(f"{folder / KEY}: is not a key that mergec makes; remove it")
        made = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(_common(subject))
            .add_extension(_alternative(role), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(folder / REQUEST, made.public_bytes(serialization.Encoding.PEM))
    return folder / REQUEST, fingerprint(key.public_key())


def sign_request(
    folder: Path,
    request: Path,
    role: str,
    name: str = "",
    days: int = 365,
    now: datetime | None = None,
) -> tuple[Path, str]:
    """Sign a request with the authority in `folder`; returns a folder to give back, and the key's
    fingerprint.

    role, name: what the one who signs expects the request to ask for. Only this goes into the
    certificate, and the key: nothing else of the request does. Raises MergecError if the request
    asks for anything else or is not signed by its key, if another key has a certificate of this
    name that was not revoked, if a certificate of this key was revoked, or if the folder cannot be
    written.
    """
    subject = _subject(role, name)
    wanted = _read_request(request)
    if (role_of(wanted), name_of(wanted)) != (role, subject):
        raise MergecError(
            f"{request}: asks for the role {role_of(wanted) or 'none'} and the name "
            f"{name_of(wanted)!r}, not for {role} and {subject!r}; make another request, or sign "
            "what it asks for"
        )
    public = wanted.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise MergecError(f"{request}: is not for a key that `mergec certs request` makes")
    authority, authority_key = _existing(folder)
    place, revoked, issued = folder / subject, _serials(folder, authority), _issued(folder)
    if (place / CERTIFICATE).exists():
        former = find_certificate(place)
        issued.append(Issued.of(former))
        if former.public_key() != public and former.serial_number not in revoked:
            raise MergecError(
                f"{place / CERTIFICATE}: is for another key; run `mergec certs revoke` first, or "
                "choose another name"
            )
    if any(entry.serial in revoked and entry.key == fingerprint(public) for entry in issued):
        raise MergecError(
            f"{request}: is for a key of which a certificate was revoked; make a new key: remove "
            f"{KEY} on the machine that uses it, and run `mergec certs request` there"
        )
    certificate = _sign(subject, role, public, authority, authority_key, _validity(days, now))
    with _told(folder):
        _record(folder, [Issued.of(certificate)])
        place.mkdir(exist_ok=True)
        _write(place / AUTHORITY, _pem(authority))
        _write(place / CERTIFICATE, _pem(certificate))
        if revoked_in(folder) is not None:
            _write(place / REVOKED, (folder / REVOKED).read_bytes())
    return place, fingerprint(public)


def revoke(folder: Path, names: Sequence[str], now: datetime | None = None) -> Path:
    """Add the certificates of these names, or in these files, to the authority's list.

    With them all certificates of the same keys are revoked, and all that were signed for a name:
    renewing leaves earlier ones valid. The list is written to `folder`, and to the folders below it
    that have this authority. It does not expire. Returns the list. Raises MergecError if a
    certificate is missing, or of another authority.
    """
    authority, key = _existing(folder)
    since = (now or datetime.now(UTC)) - _BACKDATED
    serials, issued = _serials(folder, authority), _issued(folder)
    known, named = {entry.serial for entry in issued}, {entry.name for entry in issued}
    chosen, added = [], []
    for name in names:
        chosen += [entry for entry in issued if entry.name == name]
        file = folder / name / CERTIFICATE
        if name in named and not file.exists():
            continue
        file = file if file.exists() else Path(name)
        if file.is_dir():
            file = file / CERTIFICATE
        found = read_certificate(file)
        try:
            found.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise MergecError(
                f"{file}: was signed by another authority, which alone can revoke it"
            ) from error
        entry = Issued.of(found)
        chosen.append(entry)
        if entry.serial not in known:
            added.append(entry)
    keys = {entry.key for entry in chosen}
    for entry in [*chosen, *(entry for entry in issued if entry.key in keys)]:
        serials.setdefault(entry.serial, since)
    made = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(since)
        .next_update(authority.not_valid_after_utc)
    )
    for serial, when in serials.items():
        made = made.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
        )
    data = _pem(made.sign(key, hashes.SHA256()))
    with _told(folder):
        _record(folder, added)
        _write(folder / REVOKED, data)
        for place in sorted(folder.iterdir()):
            own = place / AUTHORITY
            if own.is_file() and own.read_bytes() == (folder / AUTHORITY).read_bytes():
                _write(place / REVOKED, data)
    return folder / REVOKED


def _serials(folder: Path, authority: x509.Certificate) -> dict[int, datetime]:
    """Serial numbers of the certificates that were revoked so far, and when."""
    listed = revoked_in(folder)
    if listed is None:
        return {}
    found = read_revoked(listed, authority)
    return {entry.serial_number: entry.revocation_date_utc for entry in found}


@dataclass(frozen=True)
class Issued:
    """A certificate that the authority signed. key: its fingerprint."""

    serial: int
    name: str
    key: str

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Issued:
        """The record of a certificate."""
        key = fingerprint(certificate.public_key())
        return cls(certificate.serial_number, name_of(certificate), key)


def _issued(folder: Path) -> list[Issued]:
    """What the authority has signed, as far as it is recorded. Raises MergecError for damage."""
    file = folder / ISSUED
    try:
        # A crash can have cut the last line; its certificate was never written.
        lines = file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MergecError(f"{file}: cannot be read ({error.strerror}); correct that") from error
    found = []
    for line in lines:
        try:
            entry = Issued(**json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise _damaged(file) from error
        if [type(entry.serial), type(entry.name), type(entry.key)] != [int, str, str]:
            raise _damaged(file)
        found.append(entry)
    return found


def _damaged(file: Path) -> MergecError:
    return MergecError(
        f"{file}: is damaged, so which certificates exist is not known; restore it from a backup, "
        "or make a new authority"
    )


def _record(folder: Path, entries: Sequence[Issued]) -> None:
    """Append to what the authority has signed, durably: before a certificate leaves it.

    A record that was cut by a crash is removed, as its certificate was never written.
    """
    if not entries:
        return
    text = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries).encode()
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    with os.fdopen(os.open(folder / ISSUED, flags, 0o644), "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def _read_request(file: Path) -> x509.CertificateSigningRequest:
    told = "`mergec certs request` makes one"
    try:
        found = x509.load_pem_x509_csr(file.read_bytes())
        valid = found.is_signature_valid and found.public_key() and name_of(found)
    except OSError as error:
        raise MergecError(f"{file}: cannot be read ({error.strerror}); {told}") from error
    except UNREADABLE as error:
        raise MergecError(f"{file}: is not a request for a certificate; {told}") from error
    if not valid:
        raise MergecError(f"{file}: is not signed by the key that it is for; {told}")
    return found


def _existing(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate, key = read_certificate(folder / AUTHORITY), read_key(folder / AUTHORITY_KEY)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or (
        key.public_key() != certificate.public_key()
    ):
        raise MergecError(f"{folder / AUTHORITY_KEY}: is not the key of this authority")
    return certificate, key


def _authority(
    folder: Path, valid: tuple[datetime, datetime]
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    if (folder / AUTHORITY).exists():
        return _existing(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _common(_AUTHORITY_NAME)
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
    _write(folder / AUTHORITY, _pem(certificate))
    return certificate, key


def _sign(
    name: str,
    role: str,
    public: ec.EllipticCurvePublicKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    valid: tuple[datetime, datetime],
) -> x509.Certificate:
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(_common(name))
        .issuer_name(authority.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(min(valid[1], authority.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(_alternative(role), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _alternative(role: str) -> x509.SubjectAlternativeName:
    """The role, as certificates and requests name it."""
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(ROLE_URI + role)])


def _common(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


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


def _pem(made: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return made.public_bytes(serialization.Encoding.PEM)


def _write(file: Path, data: bytes, *, secret: bool = False) -> None:
    """Write a file as a whole: roles may read it at any moment, for a handshake."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with os.fdopen(os.open(unfinished, flags, 0o600 if secret else 0o644), "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(file)


def _validity(days: int, now: datetime | None) -> tuple[datetime, datetime]:
    now = now or datetime.now(UTC)
    return now - _BACKDATED, now + timedelta(days=days)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into a MergecError of one line."""
    try:
        yield
    except OSError as error:
        raise MergecError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); choose another "
            "place"
        ) from error
