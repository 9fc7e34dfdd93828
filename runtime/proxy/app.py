"""The endpoint's routes: /v1/models, /v1/completions, /v1/chat/completions, and the page at /."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mergec.runtime.core.errors import MergecError
from mergec.runtime.proxy.answer import Answer, Part
from mergec.runtime.proxy.errors import ApiError, explain, invalid, place_of
from mergec.runtime.proxy.key import KeyCheck
from mergec.runtime.proxy.reader import Reader
from mergec.runtime.proxy.replies import ChatForm, CompletionForm, Form, cost
from mergec.runtime.proxy.requests import ChatRequest, CompletionRequest, StreamOptions, Wanted
from mergec.runtime.proxy.sessions import Sessions

PAGE = "page.html"
_PAGE_HEADERS = {
    # The page is one file, and may connect to this endpoint only.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_LEFT = 499
"""Status of a request whose client disconnected; nobody reads it."""

_UNLIMITED = 1024
"""Most tokens of an answer if no limit applies."""

MOST_BODY = 1 << 20
"""Largest request in bytes: more than any prompt that a program accepts."""

T = TypeVar("T")


def make_app(
    sessions: Sessions, hosts: Sequence[str], origins: Sequence[str], log: Any, key: str = ""
) -> FastAPI:
    """The endpoint. hosts: accepted Host headers. origins: of web pages that may send requests.

    key: what requests must show; empty if they need none.
    """
    endpoint = Endpoint(sessions, log)
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=endpoint.lifespan,
        # Web pages may send other content types without a preflight: do not read those as JSON.
        strict_content_type=True,
    )
    app.add_middleware(BodyLimit)
    if key:
        app.add_middleware(KeyCheck, key=key)
    # Prevents DNS rebinding: a web page could point its own host name at this machine.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_api_route("/", endpoint.page, response_class=HTMLResponse)
    app.add_api_route("/about", endpoint.about)
    app.add_api_route("/v1/models", endpoint.models)
    app.add_api_route("/v1/models/{name:path}", endpoint.model)
    app.add_api_route("/v1/completions", endpoint.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", endpoint.chat, methods=["POST"], response_model=None)
    app.add_exception_handler(RequestValidationError, _refuse_request)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(ClientDisconnect, _forget)
    for kind in (ApiError, MergecError, Exception):
        app.add_exception_handler(kind, endpoint.refuse)
    return app


async def _forget(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_LEFT)


async def _refuse_request(_request: Request, error: Exception) -> Response:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    told = invalid(found)
    return JSONResponse(told.json(), told.status)


async def _refuse_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = {}
    if status in (404, 405):
        told = ApiError(
            status, f"there is no {request.method} {request.url.path} here", code="unknown_url"
        )
    elif status == 413:
        told = ApiError(status, f"a request may have at most {MOST_BODY} bytes", code="too_large")
        headers = {"Connection": "close"}  # otherwise the rest would be waited for
    else:
        told = ApiError(status, "the body cannot be read; send a JSON object", code="invalid_json")
    return JSONResponse(told.json(), status, headers)


class BodyLimit:
    """Rejects a request once its body exceeds the limit, so the rest is not kept in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST_BODY:
                raise HTTPException(413)
            return message

        await self._app(scope, bounded, send)


class Endpoint:
    """One model, answered by sessions with its server."""

    def __init__(self, sessions: Sessions, log: Any) -> None:
        self._sessions, self._text, self._log = sessions, sessions.text, log
        manifest = sessions.program.manifest
        self._manifest = manifest
        self._model = manifest.model
        self._revealed = manifest.reveals_logits
        self._encodes = sessions.program.encodes
        self._stop = frozenset(manifest.stop_tokens)
        # OpenAI's default is 1. Where the parties choose the token it is the checkpoint's own one.
        stated = manifest.generation.temperature
        self._temperature = (1.0 if stated is None else stated) if self._revealed else None
        self._fingerprint = f"mergec-{manifest.program_hash[:12]}"
        self._began = int(time.time())

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, self._sessions.close)

    async def refuse(self, _request: Request, error: Exception) -> Response:
        """Respond to an error. Logs internal errors without messages, which may quote prompts."""
        told = explain(error)
        if told.status == 500:
            self._log.error("internal error", kind=type(error).__name__, at=place_of(error))
        return JSONResponse(told.json(), told.status, told.headers)

    # ------------------------------------------------------------------------------- routes

    async def page(self) -> HTMLResponse:
        """The chat page."""
        text = (files("mergec.runtime.proxy") / PAGE).read_text(encoding="utf-8")
        return HTMLResponse(text, headers=_PAGE_HEADERS)

    async def about(self) -> dict[str, Any]:
        """What the page shows about the program and its sessions."""
        manifest, sessions = self._manifest, self._sessions
        return {
            "model": self._model,
            "chat": self._text.has_chat,
            "lossy": manifest.lossy,
            "weights": manifest.weights,
            "reveal": manifest.reveal,
            "public_blocks": sessions.blocks,
            "max_length": self._room(),
            "program": manifest.program_hash,
            "sessions": sessions.most,
            "busy": sessions.busy,
            "setup": cost([sessions.setup]) if sessions.setup else None,
        }

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._described()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._described()

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._began,
            "owned_by": "mergec",
        }

    async def complete(self, wanted: CompletionRequest, request: Request) -> Response:
        self._check_model(wanted.model)
        words = isinstance(wanted.prompt, str)
        blocks = self._blocks(wanted, follows=words and not self._text.has_chat)
        ids = (
            self._sessions.encode(wanted.prompt, blocks)
            if isinstance(wanted.prompt, str)
            else wanted.prompt
        )
        # A completion continues its prompt, but that of an encoder-decoder is a text of its own, as
        # an answer to a chat is.
        after = [] if self._encodes else ids
        return await self._reply(wanted, ids, CompletionForm, request, blocks, after)

    async def chat(self, wanted: ChatRequest, request: Request) -> Response:
        self._check_model(wanted.model)
        if not self._text.has_chat:
            raise ApiError(400, "this model has no chat template; use /v1/completions")
        blocks = self._blocks(wanted, follows=True)
        ids = self._sessions.encode_chat([message.turn() for message in wanted.messages], blocks)
        return await self._reply(wanted, ids, ChatForm, request, blocks)

    # ------------------------------------------------------------------------------- checks

    def _check_model(self, name: str) -> None:
        if name != self._model:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; ask for {self._model!r}",
                param="model",
                code="model_not_found",
            )

    def _blocks(self, wanted: Wanted, follows: bool) -> list[int]:
        """The numbers of the public blocks that a request combines; all if it names none.

        follows: whether its prompt has the form that blocks come before. Otherwise it combines none
        unless it names some, which raises ApiError, as do blocks that are not there.
        """
        count, named = self._sessions.blocks, wanted.public_blocks
        if named is None:
            return list(range(count)) if follows else []
        why = ""
        if named and not count:
            why = "this endpoint has none; start it with --public-block, or leave this out"
        elif named and not follows:
            form = "the messages of a chat" if self._text.has_chat else "a text"
            why = f"blocks come before {form} here, not before this prompt; leave this out"
        elif any(number >= count for number in named):
            why = f"this endpoint has {count} blocks, numbered from 0"
        if why:
            raise ApiError(
                400, f"public_blocks: {why}", param="public_blocks", code="invalid_value"
            )
        return named

    def _room(self) -> int:
        """Most tokens of prompt and answer together; 0 for no limit."""
        limits = (self._manifest.max_length, self._sessions.limits.get("length", 0))
        return min((limit for limit in limits if limit), default=0)

    def _tokens(self, wanted: Wanted, length: int) -> int:
        """Most tokens to generate after a prompt of `length` tokens.

        A request for more than fit is reduced to as many as fit, because apps request what other
        models allow. Raises ApiError if the prompt is empty or leaves no room.
        """
        if not length:
            raise ApiError(400, "the prompt is empty; say something", code="empty_prompt")
        room, most = self._room(), self._sessions.limits.get("tokens", 0)
        if room and length >= room:
            raise ApiError(
                400,
                f"This model's maximum context length is {room} tokens, and the prompt has "
                f"{length}; shorten it",
                param="messages" if isinstance(wanted, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        limits = (wanted.most_tokens, room and room - length, most)
        return min((limit for limit in limits if limit), default=_UNLIMITED)

    # ------------------------------------------------------------------------------ answers

    async def _reply(
        self,
        wanted: Wanted,
        ids: list[int],
        form: type[Form],
        request: Request,
        blocks: Sequence[int] = (),
        after: Sequence[int] = (),
    ) -> Response:
        best = wanted.best
        if best is not None and not self._revealed:
            raise ApiError(
                400,
                "this program reveals only tokens, so there are no log-probabilities; leave "
                "logprobs out",
                param="logprobs",
                code="unsupported_value",
            )
        tokens = self._tokens(wanted, self._sessions.padded(len(ids)))
        sampling = wanted.sampling(self._temperature)
        job = self._sessions.ask(ids, blocks, max_tokens=tokens, sampling=sampling)
        reader = Reader(self._text, wanted.stop or (), best, after)
        answered = self._sessions.answered
        drafts = self._sessions.drafts
        answer = Answer(job, reader, len(ids), self._stop, self._log, answered, drafts)
        made = form(self._model, self._fingerprint, places=best is not None)
        try:
            if wanted.stream:
                # Errors surface with the first token, while a status can still be sent.
                first = await _unless_left(request, answer.next())
                return _EventStream(_chunks(wanted, made, answer, first), answer)
            whole = await _unless_left(request, answer.all())
            answer.close()
            return JSONResponse(made.whole(whole, answer.finish, answer.usage))
        except ClientDisconnect:
            answer.close()
            raise
        except BaseException as error:
            answer.close(error)
            raise


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(
    wanted: Wanted, form: Form, answer: Answer, first: Part | None
) -> AsyncIterator[dict[str, Any]]:
    """A stream's chunks, as OpenAI clients expect them."""
    options = wanted.stream_options or StreamOptions()
    unused = {"usage": None} if options.include_usage else {}
    opening = form.first()
    if opening is not None:
        yield {**opening, **unused}
    part = first
    while part is not None:
        piece = part.piece
        told = {"cost": cost(part.reports)} if options.include_cost and part.reports else {}
        if piece.text or piece.places or told:
            yield {**form.chunk(piece), **unused, **told}
        part = await answer.next()
    yield {**form.last(answer.finish), **unused}
    if options.include_usage:
        yield form.used(answer.usage)


class _EventStream(StreamingResponse):
    """Chunks as server-sent events. The answer's session is freed however the stream ends."""

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], answer: Answer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(chunks), headers=headers, media_type="text/event-stream")
        self._answer = answer

    async def _events(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield _event(chunk)
        except Exception as error:  # noqa: BLE001  (the status is sent: told within the stream)
            self._answer.close(error)
            yield _event(explain(error).json())
            return
        yield "data: [DONE]\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"
