"""Certificates: the role counts, keys stay where they are made, and what is revoked is refused."""

from __future__ import annotations

import base64
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509 import (
    CertificateBuilder,
    Name,
    NameAttribute,
    load_pem_x509_certificate,
)
from cryptography.x509.oid import NameOID

from mergec.runtime.core.errors import MergecError, PartyError
from mergec.runtime.session.handshake import be_greeted, greet
from mergec.runtime.session.hello import Hello
from mergec.runtime.transport import authority
from mergec.runtime.transport.authority import (
    AUTHORITY_KEY,
    ISSUED,
    REQUEST,
    make_authority,
    make_certificates,
    make_request,
    revoke,
    sign_request,
)
from mergec.runtime.transport.certificates import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    find_certificate,
    fingerprint,
    name_of,
    role_of,
)
from mergec.runtime.transport.channel import Channel
from mergec.runtime.transport.connect import Security, accept
from tests.handshakes import meet

PARTIES = ("client", "server")


def greeted(identity: Security, claimed: str, dealer: Security) -> Any:
    """What the dealer takes a peer for that claims a role: its role and name, or the error."""
    hello = Hello("dealer", "mergec", "ab" * 32)

    def listening() -> Any:
        channel = accept(listener.accept()[0], dealer, PARTIES, 5.0)
        try:
            be_greeted(channel, hello, PARTIES)
        except PartyError as error:
            channel.fail(str(error))
            return error
        return channel.peer, channel.name

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listening)
        near = socket.create_connection(listener.getsockname())
        context = identity.context(listening=False)
        wrapped = context.wrap_socket(near) if context else near
        channel = Channel(wrapped, "dealer", 5.0)
        with suppress(PartyError):
            greet(channel, replace(hello, role=claimed))
        channel.close()  # for which a dealer that has refused waits
        return accepted.result(10)


@pytest.mark.parametrize("name", ["client", "server", "dealer", "ann", "client or server", ""])
def test_the_role_of_a_certificate_counts_whatever_its_name_is(tmp_path: Path, name: str) -> None:
    """Names that `mergec certs` refuses, but that an authority may have signed otherwise."""
    make_certificates(tmp_path, ("ann",))
    authority = load_pem_x509_certificate((tmp_path / AUTHORITY).read_bytes())
    key = load_pem_private_key((tmp_path / AUTHORITY_KEY).read_bytes(), None)
    place = tmp_path / "ann"
    real = find_certificate(place)
    subject = Name([NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    made = CertificateBuilder(
        authority.subject, subject, real.public_key(), 7, real.not_valid_before_utc,
        real.not_valid_after_utc, list(real.extensions),
    )  # fmt: skip
    (place / CERTIFICATE).write_bytes(made.sign(key, SHA256()).public_bytes(Encoding.PEM))
    dealer = Security("dealer", tmp_path)
    ann = Security("client", place)
    assert greeted(ann, "client", dealer) == ("client", name or "client")
    for claimed in ("server", "dealer"):
        told = greeted(ann, claimed, dealer)
        assert "client was expected, but the peer says it is the" in str(told)
    assert greeted(Security("server", tmp_path), "server", dealer) == ("server", "server")
    assert "server was expected" in str(greeted(Security("server", tmp_path), "client", dealer))


def test_a_claim_counts_without_certificates_only() -> None:
    plain = [Security(role, None, plaintext=True) for role in ("client", "dealer")]
    assert greeted(plain[0], "server", plain[1]) == ("server", "server")
    assert "client was expected" in str(greeted(plain[0], "dealer", plain[1]))


def test_keys_stay_on_the_machine_that_uses_them(tmp_path: Path) -> None:
    authority = tmp_path / "authority"
    make_authority(authority)
    keys = {}
    for role, name in (("server", ""), ("client", "ann")):
        place = tmp_path / f"{role}-machine"
        request, key = make_request(place, role, name)
        assert (place / KEY).stat().st_mode & 0o077 == 0
        assert make_request(place, role, name) == (request, key), "the key is kept"
        sent, signed = sign_request(authority, request, role, name)
        assert signed == key
        assert sorted(file.name for file in sent.iterdir()) == ["authority.pem", "certificate.pem"]
        for file in sent.iterdir():
            shutil.copy(file, place)
        found = find_certificate(place)
        assert (role_of(found), name_of(found)) == (role, name or role)
        assert fingerprint(found.public_key()) == key
        keys[role] = key
    assert not list(authority.rglob(KEY))
    server = Security("server", tmp_path / "server-machine", accepted=[keys["client"].upper()])
    ann = Security("client", tmp_path / "client-machine", accepted=[keys["server"]])
    client, accepted = meet(ann, server)
    assert (client.name, accepted.name) == ("server", "ann")
    with pytest.raises(MergecError, match="exists; use this authority"):
        make_authority(authority)


def test_requests_that_are_not_signed(tmp_path: Path) -> None:
    authority = tmp_path / "authority"
    make_authority(authority)
    request, _ = make_request(tmp_path / "eve", "client", "eve")
    for role, name in (("server", ""), ("dealer", ""), ("client", "ann")):
        with pytest.raises(MergecError, match="asks for the role client and the name 'eve', not"):
            sign_request(authority, request, role, name)
    with pytest.raises(MergecError, match="there is no role 'boss'"):
        sign_request(authority, request, "boss")
    with pytest.raises(MergecError, match="only clients have names"):
        make_request(tmp_path / "eve", "server", "eve")
    sign_request(authority, request, "client", "eve")
    sign_request(authority, request, "client", "eve")  # renewed
    other, _ = make_request(tmp_path / "mallory", "client", "eve")
    with pytest.raises(MergecError, match="is for another key; run `mergec certs revoke` first"):
        sign_request(authority, other, "client", "eve")
    revoke(authority, ["eve"])
    sign_request(authority, other, "client", "eve")
    data = bytearray(base64.b64decode(b"".join(other.read_bytes().splitlines()[1:-1])))
    data[-1] ^= 1
    other.write_bytes(
        b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(data)
        + b"-----END CERTIFICATE REQUEST-----\n"
    )  # fmt: skip
    with pytest.raises(MergecError, match="is not signed by the key that it is for"):
        sign_request(authority, other, "client", "eve")
    other.write_text("no request")
    with pytest.raises(MergecError, match="is not a request for a certificate"):
        sign_request(authority, other, "client", "eve")
    with pytest.raises(MergecError, match=f"{REQUEST}: cannot be read"):
        sign_request(authority, tmp_path / REQUEST, "client", "eve")
    with pytest.raises(MergecError, match="cannot be read"):
        sign_request(tmp_path / "none", request, "client", "eve")


def test_a_revoked_certificate_is_refused_from_the_next_handshake_on(tmp_path: Path) -> None:
    make_certificates(tmp_path, ("ann", "bob"))
    ann, bob = (Security("client", tmp_path / name) for name in ("ann", "bob"))
    (tmp_path / "mallory").mkdir()
    for file in (tmp_path / "ann").iterdir():
        shutil.copy(file, tmp_path / "mallory")
    mallory = Security("client", tmp_path / "mallory")
    server = Security("server", tmp_path)
    assert meet(ann, server)[1].name == "ann"
    listed = revoke(tmp_path, ["ann"])
    assert listed == tmp_path / "revoked.pem"
    # Both ends say so, although neither was started again.
    (tmp_path / "mallory" / "revoked.pem").unlink()
    client, accepted = meet(mallory, server)
    assert "'ann' was rejected: the certificate of 'ann' was revoked; ask the authority" in str(
        accepted
    )
    with pytest.raises(PartyError, match="the server says: the certificate of 'ann' was revoked"):
        client.exchange(None, 1)
    assert meet(bob, server)[1].name == "bob"
    with pytest.raises(MergecError, match=r"ann/certificate.pem: was revoked, as .*revoked.pem"):
        Security("client", tmp_path / "ann")
    # Its owner gets a new one, for a new key.
    assert make_certificates(tmp_path, ("ann", "bob")) == [tmp_path / "ann"]
    assert meet(Security("client", tmp_path / "ann"), server)[1].name == "ann"
    assert "the certificate of 'ann' was revoked" in str(meet(mallory, server)[1])
    # Further ones are added, and the server's, too, which its peers notice.
    revoke(tmp_path, [str(tmp_path / "server" / CERTIFICATE)])
    (tmp_path / "mallory" / "revoked.pem").unlink()
    assert "the certificate of 'ann' was revoked" in str(meet(mallory, server)[1])
    connected, _ = meet(bob, server)
    assert "the certificate of 'server' was revoked; ask the authority" in str(connected)


def test_lists_that_will_not_do_let_nobody_in(tmp_path: Path) -> None:
    make_certificates(tmp_path, ("ann",))
    make_certificates(tmp_path / "other", ("ann",))
    foreign = revoke(tmp_path / "other", ["ann"])
    with pytest.raises(MergecError, match="was signed by another authority, which alone"):
        revoke(tmp_path, [str(tmp_path / "other" / "ann")])
    with pytest.raises(MergecError, match="is not signed by the authority of this party"):
        Security("server", tmp_path, revoked=foreign)
    with pytest.raises(MergecError, match="none: cannot be read"):
        Security("server", tmp_path, revoked=tmp_path / "none")
    with pytest.raises(MergecError, match="give --certs"):
        Security("server", None, plaintext=True, revoked=foreign)
    mine = revoke(tmp_path, ["dealer"])
    given = shutil.copy(mine, tmp_path / "given.pem")
    ann = Security("client", tmp_path / "ann")
    server = Security("server", tmp_path, revoked=Path(given))
    assert meet(ann, server)[1].name == "ann"
    # What changes after the start counts at the next handshake.
    for content in (b"", b"no list", foreign.read_bytes()):
        Path(given).write_bytes(content)
        _, accepted = meet(ann, server)
        assert isinstance(accepted, MergecError)
    Path(given).unlink()
    assert "given.pem: cannot be read (No such file" in str(meet(ann, server)[1])


def test_a_list_brings_in_no_authority(tmp_path: Path) -> None:
    """Not even with an empty list of its own, beside the true one, and at either end."""
    make_certificates(tmp_path, ("ann", "bob"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "_AUTHORITY_NAME", "another authority")
        make_certificates(tmp_path / "evil", ("ann",))
    foreign = revoke(tmp_path / "evil", [])
    revoke(tmp_path, ["bob"])
    server, ann = Security("server", tmp_path), Security("client", tmp_path / "ann")
    evil_server = Security("server", tmp_path / "evil")
    (tmp_path / "evil" / "ann" / "revoked.pem").unlink()
    evil = Security("client", tmp_path / "evil" / "ann")
    true = (tmp_path / "revoked.pem").read_bytes()
    own = (tmp_path / "evil" / AUTHORITY).read_bytes()
    mores = (own, own + foreign.read_bytes(), foreign.read_bytes(), b"words", true)
    for data in [true + more for more in mores] + [more + true for more in mores]:
        for place in ("server", "ann"):
            (tmp_path / place / "revoked.pem").write_bytes(data)
        _, accepted = meet(evil, server)
        assert isinstance(accepted, MergecError)
        assert "server/revoked.pem: is not a list of revoked certificates alone" in str(accepted)
        connected, _ = meet(ann, evil_server)
        assert isinstance(connected, MergecError)
        assert "ann/revoked.pem: is not a list of revoked certificates alone" in str(connected)
        with pytest.raises(MergecError, match="is not a list of revoked certificates alone"):
            Security("server", tmp_path)
    for place in ("server", "ann"):
        (tmp_path / place / "revoked.pem").write_bytes(true)
    # Neither does another certificate in the authority's own file.
    with (tmp_path / "server" / AUTHORITY).open("ab") as file:
        file.write(own)
    assert "the client trusts another authority" in str(meet(evil, server)[1])
    assert isinstance(meet(evil, evil_server)[1], Channel), "it is accepted where it belongs"
    assert meet(ann, server)[1].name == "ann"


def test_a_list_that_is_gone_lets_nobody_in(tmp_path: Path) -> None:
    make_certificates(tmp_path, ("ann", "bob"))
    revoke(tmp_path, ["bob"])
    listed = tmp_path / "server" / "revoked.pem"
    ann, server = Security("client", tmp_path / "ann"), Security("server", tmp_path)
    listed.unlink()
    assert "revoked.pem: cannot be read (No such file" in str(meet(ann, server)[1])
    listed.symlink_to(tmp_path / "nowhere.pem")
    assert "revoked.pem: cannot be read (No such file" in str(meet(ann, server)[1])
    with pytest.raises(MergecError, match=r"revoked.pem: cannot be read \(No such file"):
        Security("server", tmp_path)
    listed.unlink()
    listed.symlink_to(tmp_path / "revoked.pem")
    assert meet(ann, server)[1].name == "ann"
    # The authority itself forgets no list either.
    (tmp_path / "revoked.pem").unlink()
    (tmp_path / "revoked.pem").symlink_to(tmp_path / "nowhere.pem")
    for call in (lambda: revoke(tmp_path, ["ann"]), lambda: make_certificates(tmp_path)):
        with pytest.raises(MergecError, match=r"revoked.pem: cannot be read \(No such file"):
            call()


def test_only_the_keys_that_were_given_are_accepted(tmp_path: Path) -> None:
    make_certificates(tmp_path, ("ann", "bob"))
    keys = {
        name: fingerprint(find_certificate(tmp_path / name).public_key())
        for name in ("ann", "bob", "server")
    }
    ann, bob = (Security("client", tmp_path / name) for name in ("ann", "bob"))
    spaced = ":".join(keys["ann"][i : i + 2] for i in range(0, 64, 2))
    server = Security("server", tmp_path, accepted=[spaced])
    assert meet(ann, server)[1].name == "ann"
    client, accepted = meet(bob, server)
    assert f"'bob' was rejected: the server does not accept the key {keys['bob'][:16]}" in str(
        accepted
    )
    with pytest.raises(PartyError, match="the server says: the server does not accept the key"):
        client.exchange(None, 1)
    careful = Security("client", tmp_path / "ann", accepted=[keys["bob"]])
    connected, _ = meet(careful, Security("server", tmp_path))
    assert f"the client does not accept the key {keys['server'][:16]}" in str(connected)
    for wrong in ("", "ann", keys["ann"][:-1], "g" * 64):
        with pytest.raises(MergecError, match="is not a fingerprint of 64 hexadecimal digits"):
            Security("server", tmp_path, accepted=[wrong])


def test_a_folder_of_all_roles_has_one_client_that_is_meant(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    assert Security("client", tmp_path).folder == tmp_path / "client-1"
    make_certificates(tmp_path, ("ann",))
    with pytest.raises(MergecError, match=r"several parties of the role client \(ann, client-1\)"):
        Security("client", tmp_path)
    assert Security("dealer", tmp_path).folder == tmp_path / "dealer"


def signed(folder: Path, machine: Path, name: str) -> Path:
    """A certificate for the key of a machine, in its folder, by the authority in `folder`."""
    request, _ = make_request(machine, "client", name)
    place, _ = sign_request(folder, request, "client", name)
    for file in place.iterdir():
        shutil.copy(file, machine)
    return machine / CERTIFICATE


@pytest.mark.parametrize("by", ["name", "file", "name without a folder"])
def test_revoking_includes_earlier_certificates_and_the_key(tmp_path: Path, by: str) -> None:
    folder, machine = tmp_path / "authority", tmp_path / "machine"
    make_certificates(folder, ("ann",))
    server = Security("server", folder)
    earlier = signed(folder, machine, "bob").read_bytes()
    last = signed(folder, machine, "bob")
    other = signed(folder, tmp_path / "other", "ann2")
    # The same key under another name.
    (tmp_path / "alias").mkdir()
    shutil.copy(machine / KEY, tmp_path / "alias")
    alias = signed(folder, tmp_path / "alias", "bobby")
    bob, certificates = (
        Security("client", machine),
        [earlier, last.read_bytes(), alias.read_bytes()],
    )
    for data in certificates:
        last.write_bytes(data)
        assert meet(bob, server)[1].name.startswith("bob")
    if by == "name without a folder":
        shutil.rmtree(folder / "bob")
    revoke(folder, [str(alias) if by == "file" else "bob"])
    for data in certificates:
        last.write_bytes(data)
        assert "was revoked" in str(meet(bob, server)[1])
    assert meet(Security("client", other.parent), server)[1].name == "ann2"
    # The key is of no use any more, under any name, and a new one is.
    for name in ("bob", "bobby", "carol"):
        request, _ = make_request(machine, "client", name)
        with pytest.raises(MergecError, match="certificate was revoked; make a new key: remove"):
            sign_request(folder, request, "client", name)
    (machine / KEY).unlink()
    signed(folder, machine, "bob")
    assert meet(Security("client", machine), server)[1].name == "bob"


def test_an_authority_from_before_has_no_record(tmp_path: Path) -> None:
    """What is revoked is recorded then, and so is what is signed from then on."""
    folder, machine = tmp_path / "authority", tmp_path / "machine"
    make_authority(folder)
    first = signed(folder, machine, "bob").read_bytes()
    (folder / ISSUED).unlink()
    request, _ = make_request(machine, "client", "bob")
    (tmp_path / "first.pem").write_bytes(first)
    signed(folder, machine, "bob")
    revoke(folder, [str(tmp_path / "first.pem")])
    shutil.rmtree(folder / "bob")
    with pytest.raises(MergecError, match="certificate was revoked; make a new key"):
        sign_request(folder, request, "client", "bob")
    assert len((folder / ISSUED).read_bytes().splitlines()) == 2


def test_the_record_survives_a_crash_and_is_not_guessed(tmp_path: Path) -> None:
    folder, machine = tmp_path / "authority", tmp_path / "machine"
    make_authority(folder)
    signed(folder, machine, "bob")
    whole = (folder / ISSUED).read_bytes()
    (folder / ISSUED).write_bytes(whole + whole[:40])
    signed(folder, machine, "bob")
    assert (folder / ISSUED).read_bytes().startswith(whole)
    assert len((folder / ISSUED).read_bytes().splitlines()) == 2
    for damage in (b"x\n", b'{"serial": "1", "name": "bob", "key": ""}\n', b"[]\n", b"\xff\n"):
        (folder / ISSUED).write_bytes(whole + damage)
        with pytest.raises(MergecError, match=f"{ISSUED}: is damaged, so which certificates"):
            revoke(folder, ["bob"])
        with pytest.raises(MergecError, match=f"{ISSUED}: is damaged, so which certificates"):
            signed(folder, machine, "bob")
