"""Errors in the form that OpenAI clients expect."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergec.runtime.core.errors import BusyError, LimitError, PartyError, PromptError
from mergec.runtime.transport.frames import printable

INVALID, UNAVAILABLE, LIMITED = "invalid_request_error", "server_error", "rate_limit_error"


class ApiError(Exception):
    """The response to a request that cannot be answered: an HTTP status, and OpenAI's fields."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        wait: int | None = None,
    ) -> None:
        """wait: seconds after which a retry makes sense."""
        super().__init__(message)
        self.status = status
        self.headers = {} if wait is None else {"Retry-After": str(wait)}
        # Both may quote the request: make them short and safe to send, whatever it contained.
        self.fields = {
            "message": printable(message),
            "type": kind,
            "param": None if param is None else printable(param),
            "code": code,
        }

    def json(self) -> dict[str, Any]:
        return {"error": self.fields}


def explain(error: BaseException) -> ApiError:
    """Any error of an answer as ApiError. Of an internal error, only the type is reported."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LimitError):
        return ApiError(429, str(error), kind=LIMITED, code="rate_limit_exceeded", wait=error.wait)
    if isinstance(error, BusyError):
        return ApiError(429, str(error), kind=LIMITED, code="server_busy", wait=error.wait)
    if isinstance(error, PromptError):
        return ApiError(400, str(error), code="prompt_refused")
    if isinstance(error, PartyError):
        return ApiError(503, str(error), kind=UNAVAILABLE, code="party_unavailable")
    return ApiError(500, f"internal error ({type(error).__name__})", kind=UNAVAILABLE)


def place_of(error: BaseException) -> str:
    """File and line where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def invalid(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """From pydantic's findings about a request: an ApiError for the first of them."""
    first = found[0]
    code, where = str(first["type"]), [str(part) for part in first["loc"][1:]]
    if code == "json_invalid":
        return ApiError(400, "the body is not JSON; send a JSON object", code="invalid_json")
    param = ".".join(where) or None
    if code == "extra_forbidden":
        return ApiError(
            400, f"{param}: is not supported; leave it out", param=param, code="unknown_parameter"
        )
    if not where:
        return ApiError(
            400, "the body is not a JSON object sent as application/json", code="invalid_json"
        )
    known = code if code == "unsupported_value" else "invalid_value"
    return ApiError(400, f"{param}: {_words(first)}", param=param, code=known)


_WORDS = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "none_required": "is not supported; leave it out",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "string_too_short": "must not be empty",
    "too_short": "must have at least {min_length} item",
    "literal_error": "must be {expected}; nothing else is supported",
}
"""What is wrong with a parameter, by pydantic's code for it."""


def _words(found: Mapping[str, Any]) -> str:
    """What is wrong, in the words of the API. Errors of our own have theirs already."""
    code = str(found["type"])
    if code in ("invalid_value", "unsupported_value"):
        return str(found["msg"])
    return _WORDS.get(code, "has an invalid value").format(**found.get("ctx") or {})
