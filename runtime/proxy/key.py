"""The key that requests to the endpoint must show, if one was set."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mergec.runtime.core.errors import MergecError
from mergec.runtime.proxy.errors import ApiError

API_KEY_VARIABLE = "MERGEC_API_KEY"
"""Environment variable that holds the key, unless a file does."""

_LEAST = 16
_SCHEME = "bearer "


def read_api_key(file: Path | None) -> str:
    """The key in `file` or API_KEY_VARIABLE; empty if neither is given.

    Raises MergecError if it cannot be read, or is one that could be guessed or not be sent.
    """
    try:
        key = file.read_text() if file is not None else os.environ.get(API_KEY_VARIABLE, "")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise MergecError(f"{file}: cannot be read ({reason})") from error
    key = key.strip()
    if file is None and not key:
        return ""
    if len(key) < _LEAST or not key.isascii() or not key.isprintable() or " " in key:
        raise MergecError(
            f"{file or API_KEY_VARIABLE}: no key of at least {_LEAST} letters and digits; create "
            "one with `openssl rand -hex 32`"
        )
    return key


class KeyCheck:
    """Answers 401 to requests without the key. The chat page is open: it asks for the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/" or self._is_right(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        told = ApiError(
            401,
            "the API key is missing or wrong; send the header `Authorization: Bearer KEY` with the "
            "key of --api-key-file",
            code="invalid_api_key",
        )
        response = JSONResponse(told.json(), told.status, {"WWW-Authenticate": "Bearer"})
        await response(scope, receive, send)

    def _is_right(self, headers: Headers) -> bool:
        given = headers.getlist("authorization")
        if len(given) != 1 or not given[0].lower().startswith(_SCHEME):
            return False
        # Digests have one length, so the time tells neither the key's length nor its beginning.
        return hmac.compare_digest(_digest(given[0][len(_SCHEME) :].strip()), self._expected)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
