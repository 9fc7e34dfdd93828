"""The endpoint's key: where it comes from, and what requests without it get."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra proxy is not installed")

from mergec.runtime.core.errors import MergecError
from mergec.runtime.program.manifest import Manifest
from mergec.runtime.proxy.app import make_app
from mergec.runtime.proxy.key import API_KEY_VARIABLE, read_api_key
from tests import decoder

KEY = "0123456789abcdef"


def ask(key: str, path: str, *headers: tuple[str, str], method: str = "GET", **more: Any) -> Any:
    """Status, headers and body of a request to an endpoint with this key."""
    program = decoder.program("client")
    program.manifest = Manifest(model="tiny", program_hash="ab" * 32)
    sessions = SimpleNamespace(text=None, program=program)
    app = make_app(sessions, ("127.0.0.1",), more.get("origins", ()), None, key)
    told: list[dict[str, Any]] = []
    shown = [("host", "127.0.0.1"), *headers]
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": b"", "scheme": "http", "http_version": "1.1", "root_path": "",
        "headers": [(name.encode(), text.encode("latin-1")) for name, text in shown],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        told.append(message)

    asyncio.run(app(scope, receive, send))
    found = dict(told[0]["headers"])
    return told[0]["status"], found, b"".join(part.get("body", b"") for part in told[1:])


def test_requests_need_the_key_and_the_page_does_not() -> None:
    assert ask("", "/v1/models")[0] == 200
    assert ask(KEY, "/v1/models", ("authorization", f"Bearer {KEY}"))[0] == 200
    assert ask(KEY, "/v1/models", ("authorization", f"bearer  {KEY}"))[0] == 200
    assert ask(KEY, "/")[0] == 200
    assert ask(KEY, "/none", ("authorization", f"Bearer {KEY}"))[0] == 404


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/about", "/none", "//"])
@pytest.mark.parametrize(
    "shown",
    [
        (),
        (f"Bearer {KEY[:-1]}",),
        (f"Bearer {KEY}0",),
        (f"Bearer {KEY.upper()}",),
        ("Bearer ",),
        ("Bearer \xff",),
        (KEY,),
        (f"Basic {KEY}",),
        (f"Bearer {KEY}", "Bearer wrong"),
    ],
)
def test_without_the_key_nothing_is_told(path: str, shown: tuple[str, ...]) -> None:
    given = [("authorization", text) for text in shown]
    status, headers, body = ask(KEY, path, *given, method="GET" if "mod" in path else "POST")
    assert (status, headers[b"www-authenticate"]) == (401, b"Bearer")
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert error["message"].startswith("the API key is missing or wrong; send the header")
    assert KEY not in body.decode()


def test_a_browser_may_ask_whether_it_may_send_the_key() -> None:
    """The request before a page's first one carries no key."""
    origin = "https://app.example"
    preflight = [
        ("origin", origin),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization"),
    ]
    at = "/v1/chat/completions"
    status, headers, _ = ask(KEY, at, *preflight, method="OPTIONS", origins=(origin,))
    assert (status, headers[b"access-control-allow-origin"]) == (200, origin.encode())
    assert ask(KEY, at, *preflight, method="OPTIONS")[0] == 401


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert read_api_key(None) == ""
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    assert read_api_key(None) == KEY
    file = tmp_path / "key"
    file.write_text(f"{KEY}other\n")
    assert read_api_key(file) == f"{KEY}other", "the file comes first"
    for text in ("", "short", "with a space in between", "é" * 20):
        file.write_text(text)
        with pytest.raises(MergecError, match="no key of at least 16 letters and digits"):
            read_api_key(file)
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(MergecError, match=r"key: cannot be read \(it is not text\)"):
        read_api_key(file)
    with pytest.raises(MergecError, match=r"none: cannot be read \(No such file"):
        read_api_key(tmp_path / "none")
    monkeypatch.setenv(API_KEY_VARIABLE, "short")
    with pytest.raises(MergecError, match=f"{API_KEY_VARIABLE}: no key of at least 16"):
        read_api_key(None)
