"""Apps against client, server and dealer as three processes: OpenAI's own client, and a browser."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mergec.runtime.cli import INTERRUPTED, run
from mergec.runtime.core.errors import LimitError
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.program.bundle import load_bundle, role_path
from mergec.runtime.program.generation_settings import GenerationSettings
from mergec.runtime.proxy.errors import explain
from mergec.runtime.proxy.sessions import Sessions
from mergec.runtime.roles.observe import PartyMetrics
from mergec.runtime.session.sampling import Chooser, Sampling
from mergec.runtime.session.text import Text
from mergec.runtime.transport.frames import Kind
from tests import characters
from tests.browser import chromium
from tests.relay import UP, Relay
from tests.services import START, Deployment, Role, deployment, role, wait_until

openai = pytest.importorskip("openai", reason="the openai package is not installed")
httpx = pytest.importorskip("httpx2", reason="comes with openai")

MODEL, PROMPT = "tiny", "a "
HI = [{"role": "user", "content": "a"}]
"""Equal to PROMPT after the chat template."""
LONG = 80
TEXT = Text.from_files(characters.files(), "test")
SAME = {"temperature": 0}
ENTER, ESCAPE = "\ue007", "\ue00c"
"""WebDriver's names of keys."""
TOLERANCE = 2e-2
"""Tolerance of a log-probability: 16 fractional bits, one layer, and logits of about 20."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return characters.save(tmp_path_factory.mktemp("endpoint") / "bundles")


@pytest.fixture(scope="module")
def running(bundles: Path) -> Iterator[Deployment]:
    with deployment(bundles, serve=("--timeout", str(START))) as made:
        yield made


@pytest.fixture(scope="module")
def link(running: Deployment) -> Iterator[Relay]:
    """The connection between the proxy and the server."""
    relay = Relay()
    relay.target = running.server.address
    yield relay
    relay.close()


@contextmanager
def held(link: Relay) -> Iterator[None]:
    """The next answer gets as far as its fifth step, and goes on when this ends."""
    gate = threading.Event()
    link.arm([(UP, Kind.STEP, 5)], lambda _: gate.wait(START))
    try:
        yield
    finally:
        gate.set()


@pytest.fixture(scope="module")
def endpoint(running: Deployment, link: Relay) -> Iterator[Role]:
    at = ("--server", str(link.address), "--dealer", str(running.dealer.address))
    more = ("--queue", "2", "--grace", "1", "--metrics", "127.0.0.1:0")
    with role("proxy", running.bundles, *at, "--plaintext", *more) as made:
        yield made


@pytest.fixture(scope="module")
def url(endpoint: Role) -> str:
    return f"http://{endpoint.address}"


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=START)


@pytest.fixture(scope="module")
def said(bundles: Path) -> str:
    """The greedy answer to PROMPT, in plaintext."""
    return characters.plaintext(bundles, PROMPT, 12)


def answered(endpoint: Role) -> list[dict[str, Any]]:
    return [line for line in endpoint.log if line["event"] in ("answered", "answer failed")]


def next_answered(endpoint: Role, before: int) -> dict[str, Any]:
    wait_until(lambda: len(answered(endpoint)) > before)
    return answered(endpoint)[before]


def busy(url: str) -> int:
    return int(httpx.get(f"{url}/about", timeout=START).json()["busy"])


def test_the_model_is_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "mergec"


def test_whole_answers(client: Any, said: str) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=6, **SAME)
    assert chat.choices[0].message.content == said[:6]
    assert (chat.choices[0].finish_reason, chat.choices[0].message.role) == ("length", "assistant")
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (2, 6)
    ended = client.completions.create(model=MODEL, prompt="bad ", **SAME)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("k", "stop")
    fitting = client.completions.create(model=MODEL, prompt="a" * 95, max_tokens=4096, **SAME)
    assert fitting.usage.total_tokens == characters.LENGTH
    numbers = client.completions.create(
        model=MODEL, prompt=characters.ids(PROMPT), max_tokens=3, **SAME
    )
    assert numbers.choices[0].text == said[:3]


def test_streams(client: Any, said: str) -> None:
    asked = {"model": MODEL, "max_tokens": 5, "stream": True, **SAME}
    told = {"stream_options": {"include_usage": True, "include_cost": True}}
    chunks = list(client.chat.completions.create(messages=HI, extra_body=told, **asked))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks[1:-2]] == list(said[:5])
    costs = [chunk.cost for chunk in chunks[1:-2]]
    assert [cost["phase"] for cost in costs] == ["prompt", *["decode"] * 4]
    assert all(cost["bytes"] > 0 and cost["rounds"] > 0 and cost["seconds"] > 0 for cost in costs)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 7)
    plain = list(client.completions.create(prompt=PROMPT, **asked))
    assert "".join(chunk.choices[0].text for chunk in plain) == said[:5]
    assert not any(hasattr(chunk, "cost") for chunk in plain)


def test_an_answer_ends_before_a_stop_string(client: Any, said: str, endpoint: Role) -> None:
    stop = said[3:6]
    cut = said[: said.index(stop)]
    asked = {"model": MODEL, "max_tokens": LONG, "stop": ["no way", stop], **SAME}
    whole = client.chat.completions.create(messages=HI, **asked)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (cut, "stop")
    assert whole.usage.completion_tokens == said.index(stop) + len(stop)
    chunks = list(client.completions.create(prompt=PROMPT, stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer(client: Any) -> None:
    def ask(seed: int) -> str:
        asked = {"max_tokens": 8, "temperature": 2, "seed": seed}
        return client.completions.create(model=MODEL, prompt=PROMPT, **asked).choices[0].text

    assert ask(7) == ask(7) != ask(8)


def test_the_next_turn_is_computed_alone(client: Any, bundles: Path) -> None:
    """What a chat said before is in the caches, and the usage says so."""
    turns = [{"role": "user", "content": "bab"}]
    first = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=4, **SAME)
    said = first.choices[0].message.content
    turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "ab"}]
    second = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=4, **SAME)
    prompt = TEXT.render(turns)
    assert second.choices[0].message.content == characters.plaintext(bundles, prompt, 4)
    cached = second.usage.prompt_tokens_details.cached_tokens
    # All but the last token of the first answer, which no step took.
    assert cached == first.usage.total_tokens - 1


def test_a_checkpoints_settings_are_honoured_by_every_client(
    tmp_path: Path, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the endpoint where a request says nothing, by a connection, and by `mergec generate`."""
    settings = GenerationSettings(
        temperature=0.0, repetition_penalty=1.5, suppress_tokens=characters.ids(said[0])
    )
    bundles = characters.save(tmp_path / "bundles", generation=settings)
    server = load_bundle(role_path(bundles, "server"), "server")
    prompt, count = characters.ids(PROMPT), 6
    choose = Chooser(Sampling(), server.manifest, prompt, count)
    stop = server.manifest.stop_tokens
    tokens = [t for t, _ in PlainExecutor(server).generate(prompt, count, choose, stop)]
    wanted = TEXT.decode(tokens)
    assert wanted[0] != said[0]
    with deployment(bundles) as made:
        at = ("--server", str(made.server.address), "--dealer", str(made.dealer.address))
        with made.connection() as connection:
            found = connection.generate(prompt, max_tokens=count)
            assert [token.token for token in found] == tokens
        arguments = ["generate", str(bundles), *at, "--plaintext", "--max-tokens", str(count)]
        assert run([*arguments, "-p", "a"]) == 0
        assert capsys.readouterr().out.strip() == wanted.strip()
        with role("proxy", bundles, *at, "--plaintext") as proxy:
            url = f"http://{proxy.address}/v1"
            app = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=START)
            asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": count}
            assert app.completions.create(**asked).choices[0].text == wanted
            more = {"repetition_penalty": 1.0}
            other = app.completions.create(**asked, extra_body=more).choices[0].text
            lighter = replace(server.manifest, generation=replace(settings, repetition_penalty=1))
            choose = Chooser(Sampling(), lighter, prompt, count)
            found = PlainExecutor(server).generate(prompt, count, choose, stop)
            assert other == TEXT.decode([token for token, _ in found])


def test_logprobs_are_the_models(client: Any, bundles: Path, said: str) -> None:
    plain = PlainExecutor(load_bundle(role_path(bundles, "server"), "server"))
    logits = [row for _, row in plain.generate(characters.ids(PROMPT), 3)]
    wanted = [torch.log_softmax(row.double().reshape(-1), -1).max().item() for row in logits]
    asked = {"model": MODEL, "max_tokens": 3, **SAME}
    chat = client.chat.completions.create(messages=HI, logprobs=True, top_logprobs=2, **asked)
    places = chat.choices[0].logprobs.content
    assert "".join(place.token for place in places) == said[:3]
    assert [place.logprob for place in places] == pytest.approx(wanted, abs=TOLERANCE)
    for place in places:
        assert place.bytes == list(place.token.encode())
        assert place.top_logprobs[0].token == place.token
        assert place.top_logprobs[1].logprob <= place.logprob
    stream = client.completions.create(prompt=PROMPT, logprobs=1, stream=True, **asked)
    found = [chunk.choices[0].logprobs for chunk in stream if chunk.choices[0].logprobs]
    assert [token for part in found for token in part.tokens] == list(said[:3])
    assert [offset for part in found for offset in part.text_offset] == [0, 1, 2]


@pytest.mark.parametrize(
    ("more", "kind", "code", "message"),
    [
        ({"model": "gpt-4"}, "NotFoundError", "model_not_found", "ask for 'tiny'"),
        ({"n": 2}, "BadRequestError", "unsupported_value", "n: is not supported"),
        ({"extra_body": {"colour": 1}}, "BadRequestError", "unknown_parameter", "colour: is not"),
        ({"messages": []}, "BadRequestError", "invalid_value", "messages: "),
        (
            {"messages": [{"role": "user", "content": "a" * 96}]},
            "BadRequestError",
            "context_length_exceeded",
            "length is 96 tokens, and the prompt has 97",
        ),
    ],
)
def test_errors(client: Any, more: dict[str, Any], kind: str, code: str, message: str) -> None:
    with pytest.raises(getattr(openai, kind)) as found:
        client.chat.completions.create(**{"model": MODEL, "messages": HI, "max_tokens": 2, **more})
    assert found.value.code == code
    assert message in found.value.body["message"]


def test_other_routes_and_bodies(url: str) -> None:
    for method, path, body, code in (
        ("GET", "/v1/embeddings", None, "unknown_url"),
        ("GET", "/v1/completions", None, "unknown_url"),
        ("POST", "/v1/completions", "{", "invalid_json"),
        ("POST", "/v1/completions", "[]", "invalid_json"),
    ):
        headers = {"Content-Type": "application/json"}
        found = httpx.request(method, f"{url}{path}", content=body, headers=headers)
        assert found.status_code in (400, 404, 405)
        assert found.json()["error"]["code"] == code


def test_a_web_page_from_elsewhere_gets_nothing(url: str) -> None:
    body = f'{{"model": "{MODEL}", "prompt": "a ", "max_tokens": 1}}'
    for headers in ({"Content-Type": "text/plain"}, {}):
        simple = httpx.post(f"{url}/v1/completions", content=body, headers=headers)
        assert simple.status_code == 400, "what a page may send without asking first"
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    asked = httpx.options(f"{url}/v1/completions", headers=origin)
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers
    renamed = httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"})
    assert (renamed.status_code, MODEL in renamed.text) == (400, False)


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ("[" * 100_000, 400, "invalid_json", "cannot be read; send a JSON object"),
        ('{"model": "tiny", "prompt": "\xff"}'.encode("latin-1"), 400, "invalid_json", ""),
        ('{"prompt": "' + "a" * (1 << 20), 413, "too_large", "may have at most 1048576 bytes"),
        ('{"model": "%s", "prompt": "a"}' % ("m" * 9999), 404, "model_not_found", "mmm"),
        ('{"model": "\\ud800", "prompt": "a"}', 404, "model_not_found", "is not served here"),
        ('{"model": "tiny", "prompt": "\\ud800"}', 400, "invalid_value", "is not Unicode text"),
        (
            '{"model": "tiny", "\\ud800": 1, "prompt": "a"}',
            400,
            "invalid_json",
            "not a JSON object",
        ),
        ('{"model": "tiny", "prompt": [-1]}', 400, "prompt_refused", "-1"),
        ('{"model": "tiny", "prompt": [1e400]}', 400, "invalid_value", "token numbers"),
        ('{"model": "tiny", "prompt": [%s]}' % ("9" * 5000), 400, "invalid_json", "JSON"),
        ('{"model": "tiny", "prompt": "a", "max_tokens": -1}', 400, "invalid_value", "max_tokens"),
        ('{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "invalid_value", "temper"),
        ('{"model": "tiny", "prompt": "a", "top_p": Infinity}', 400, "invalid_value", "top_p"),
        ('{"model": "tiny", "prompt": {"a": 1}}', 400, "invalid_value", "prompt"),
        ('{"model": ["tiny"], "prompt": "a"}', 400, "invalid_value", "model"),
        ("null", 400, "invalid_json", "not a JSON object"),
        ("", 400, "invalid_json", "not a JSON object"),
    ],
)
def test_hostile_bodies(
    url: str, endpoint: Role, body: str | bytes, status: int, code: str, message: str
) -> None:
    headers = {"Content-Type": "application/json"}
    found = httpx.post(f"{url}/v1/completions", content=body, headers=headers)
    told = found.json()["error"]
    assert (found.status_code, told["code"]) == (status, code), told
    assert message in told["message"]
    assert len(found.content) < 1000
    assert "internal error" not in endpoint.output


def test_an_endless_body_is_not_kept(url: str, endpoint: Role) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        while True:
            yield b"a" * 65536

    resident = psutil.Process(endpoint.process.pid).memory_info().rss
    with suppress(httpx.HTTPError):  # it may be cut off before the answer is read
        headers = {"Content-Type": "application/json"}
        found = httpx.post(f"{url}/v1/completions", content=chunks(), headers=headers)
        assert found.status_code == 413
    assert psutil.Process(endpoint.process.pid).memory_info().rss < resident + (32 << 20)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", ""]
)
def test_only_names_of_this_machine_are_answered(url: str, host: str) -> None:
    body = {"model": MODEL, "prompt": "a ", "max_tokens": 1}
    for found in (
        httpx.get(f"{url}/v1/models", headers={"Host": host}),
        httpx.post(f"{url}/v1/completions", json=body, headers={"Host": host}),
    ):
        assert (found.status_code, MODEL in found.text) == (400, False)


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_place(
    client: Any,
    endpoint: Role,
    running: Deployment,
    link: Relay,
    url: str,
    said: str,
    stream: bool,
) -> None:
    before = len(answered(endpoint))
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": LONG, **SAME}
    with held(link):
        if stream:
            with client.completions.create(stream=True, **asked) as chunks:
                next(iter(chunks))
        else:
            at = endpoint.address
            with socket.create_connection((at.host, at.port)) as connection:
                body = json.dumps(asked)
                head = (
                    f"Host: {at}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
                )
                connection.sendall(
                    f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{body}".encode()
                )
                wait_until(lambda: busy(url) == 1)
        left = next_answered(endpoint, before)
    assert left["how"] == "stopped"
    assert left["tokens"] < LONG
    again = client.completions.create(**{**asked, "max_tokens": 4})
    assert again.choices[0].text == said[:4]
    assert sum(line["event"] == "session began" for line in running.server.log) == 1


def test_requests_wait_for_the_session_and_too_many_are_turned_away(
    client: Any, endpoint: Role, link: Relay, url: str, said: str
) -> None:
    before = len(answered(endpoint))

    def ask(number: int) -> str:
        asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": number, **SAME}
        return client.completions.create(**asked).choices[0].text

    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": LONG, **SAME}
    with ThreadPoolExecutor(2) as pool:
        with held(link), client.completions.create(stream=True, **asked) as chunks:
            next(iter(chunks))
            waiting = [pool.submit(ask, 3), pool.submit(ask, 4)]
            wait_until(lambda: busy(url) == 3)
            with pytest.raises(openai.RateLimitError) as found:
                ask(2)
            assert found.value.code == "too_many_requests"
            wait = found.value.response.headers["Retry-After"]
            assert f"2 requests wait; try again in {wait} s" in str(found.value)
            chunks.close()
            assert next_answered(endpoint, before)["how"] == "stopped"
        assert [job.result() for job in waiting] == [said[:3], said[:4]]


def test_a_server_without_room_is_429_with_the_time_to_wait(bundles: Path) -> None:
    relay = Relay()
    with deployment(bundles, serve=("--sessions", "1", "--queue", "0")) as made:
        relay.target = made.server.address
        at = ("--server", str(relay.address), "--dealer", str(made.dealer.address))
        with role("proxy", bundles, *at, "--plaintext") as proxy:
            url = f"http://{proxy.address}/v1"
            relay.disarm()  # the proxy loses its session
            wait_until(lambda: not made.server.workers)
            asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, "stream": True}
            with made.connection():
                told = httpx.post(f"{url}/completions", json=asked, timeout=START)
            assert told.status_code == 429
            error = told.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "server_busy")
            assert error["message"].endswith(f"try again in {told.headers['Retry-After']} s")
            wait_until(lambda: not made.server.workers)
            assert httpx.post(f"{url}/completions", json=asked, timeout=START).status_code == 200
    relay.close()


def test_a_session_that_ended_is_begun_anew(
    client: Any, endpoint: Role, running: Deployment, link: Relay, said: str
) -> None:
    began = sum(line["event"] == "session began" for line in running.server.log)
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": LONG, **SAME}
    with held(link):
        stream = iter(client.completions.create(stream=True, **asked))
        next(stream)
        for worker in running.server.workers:
            worker.kill()
        with pytest.raises(openai.APIError, match="the server went away"):
            list(stream)
    assert answered(endpoint)[-1]["event"] == "answer failed"
    assert client.completions.create(**{**asked, "max_tokens": 3}).choices[0].text == said[:3]
    for worker in running.server.workers:  # now while nobody asks
        worker.kill()
    assert client.completions.create(**{**asked, "max_tokens": 3}).choices[0].text == said[:3]
    assert sum(line["event"] == "session began" for line in running.server.log) == began + 2


def test_the_log_holds_lengths_and_no_words(client: Any, endpoint: Role) -> None:
    before, start = len(answered(endpoint)), len(endpoint.output)
    secret = "deaf bee fed"
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": secret}], max_tokens=9, **SAME
    )
    line = next_answered(endpoint, before)
    assert (line["prompt"], line["tokens"]) == (len(secret) + 1, answer.usage.completion_tokens)
    for word in (secret, answer.choices[0].message.content, "Traceback"):
        assert word not in endpoint.output[start:]
    assert "Traceback" not in endpoint.output


def test_metrics_count_what_the_client_saw(client: Any, endpoint: Role) -> None:
    def counted() -> dict[str, float]:
        page = httpx.get(f"http://{endpoint.metrics}/metrics").text
        lines = [line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#"]
        return {name.removeprefix("mergec_client_"): float(value) for name, value in lines}

    before = counted()
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, **SAME)
    after = counted()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached in range(len(PROMPT))
    assert grown['tokens_total{phase="prompt"}'] == len(PROMPT) - cached
    assert grown['tokens_total{phase="decode"}'] == 2
    assert grown['answers_total{how="length"}'] == 1
    for kind in ("sent", "received", "offline"):
        assert grown[f'bytes_total{{kind="{kind}"}}'] > 0
    assert after["rounds_total"] > before["rounds_total"] > 0
    assert after["requests"] == 0


def test_the_page_needs_nothing_from_elsewhere(url: str) -> None:
    found = httpx.get(url)
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert set(re.findall(r"https?://[\w./]+", found.text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"""src\s*=|@import|url\(""", found.text)


def test_the_page_in_a_browser(
    url: str, endpoint: Role, link: Relay, said: str, tmp_path: Path
) -> None:
    with chromium(tmp_path / "profile") as browser:
        browser.get(url)

        def text(selector: str) -> list[str]:
            return [found.text for found in browser.find_elements("css selector", selector)]

        def wait_for(condition: Callable[[], object]) -> None:
            try:
                wait_until(condition)
            except AssertionError as error:
                raise AssertionError(text("main")) from error

        wait_for(lambda: text("#who tr"))
        assert text("#model") == [MODEL]
        assert text("#who tr")[0].split() == ["Your", "words", "yes", "no", "no"]
        assert "Opening the session took" in text("#setup")[0]
        most, words = (browser.find_element("id", name) for name in ("most", "input"))
        assert words == browser.switch_to.active_element
        most.clear()
        most.send_keys("5")
        words.send_keys("a", ENTER)
        wait_for(lambda: text(".turn.assistant .foot"))
        assert text(".said") == ["a", said[:5]]
        assert "5 tokens" in text(".foot")[0]
        assert text("#tokens") == ["5"]
        for figure in ("#speed", "#bytes", "#rounds", "#total"):
            assert float(text(figure)[0]) > 0
        assert text("#first")[0].endswith(" s")
        assert f"{text('#bytes')[0]} MB and {text('#rounds')[0]} rounds each" in text(".foot")[0]
        assert not text(".wait")
        assert len(browser.find_elements("css selector", "#steps i")) == 5

        before = len(answered(endpoint))
        most.clear()
        most.send_keys(str(LONG))
        with held(link):
            words.send_keys("b", ENTER)
            wait_for(lambda: len(text(".said")) == 4 and text(".said")[3])
            words.send_keys(ESCAPE)
            wait_for(lambda: len(text(".turn.assistant .foot")) == 2)
            assert text(".foot")[1].startswith("stopped")
            assert next_answered(endpoint, before)["how"] == "stopped"

        root = browser.find_element("css selector", "html")
        themes = []
        for _ in range(2):
            themes.append(root.get_attribute("data-theme"))
            browser.find_element("id", "theme").click()
        assert sorted(themes) == ["dark", "light"]
        browser.find_element("id", "new").click()
        assert not text(".turn")
        assert browser.find_element("id", "hello").is_displayed()
        assert not browser.get_log("browser")

        # A request that was rejected is put back for editing.
        words.send_keys("a" * LONG * 2, ENTER)
        wait_for(lambda: text(".error"))
        assert "maximum context length is 96 tokens" in text(".error")[0]
        wait_for(lambda: words.get_attribute("value") == "a" * LONG * 2)


def test_sigterm_ends_the_sessions(client: Any, endpoint: Role, running: Deployment) -> None:
    before = sum(line["event"] == "session ended" for line in running.server.log)
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": LONG, **SAME}
    stream = client.completions.create(stream=True, **asked)
    next(iter(stream))
    assert endpoint.stop() == 0
    stream.close()
    assert answered(endpoint)[-1]["how"] in ("stopped", "length")
    assert endpoint.log[-1]["event"] == "stopped"
    running.server.wait_for("session ended", before + 1)
    assert "Traceback" not in endpoint.output


# ---------------------------------------------------------------------- several sessions


def test_sessions_side_by_side_within_the_servers_limits(bundles: Path, said: str) -> None:
    async def ask(sessions: Sessions, count: int) -> str:
        job = sessions.ask(characters.ids(PROMPT), max_tokens=count)
        tokens = []
        while (token := await job.next()) is not None:
            tokens.append(token.token)
        return "".join(characters.SYMBOLS[token] for token in tokens)

    async def ask_many(sessions: Sessions) -> None:
        assert sessions.most == 2, "of the five that were wanted"
        both = await asyncio.gather(ask(sessions, 9), ask(sessions, 8))
        assert both == [said[:9], said[:8]]
        await ask(sessions, 12)
        with pytest.raises(LimitError) as found:
            await ask(sessions, 4)
        told = explain(found.value)
        assert (told.status, told.fields["code"]) == (429, "rate_limit_exceeded")
        assert 0 < int(told.headers["Retry-After"]) <= 60

    with deployment(bundles, serve=("--client-sessions", "2", "--rate", "24")) as made:
        sessions = Sessions(made.connection, most=5, queue=0, metrics=PartyMetrics("client"))
        asyncio.run(ask_many(sessions))
        assert sum(line["event"] == "session began" for line in made.server.log) == 2
        sessions.close()
        made.server.wait_for("session ended", 2)
        at = ("--server", str(made.server.address), "--dealer", str(made.dealer.address))
        with role("proxy", bundles, *at, "--plaintext") as stopped:
            stopped.wait_for("listening")
            assert stopped.stop(signal.SIGINT) == INTERRUPTED
            assert stopped.output.splitlines()[-1] == "stopped"


def test_an_exposed_endpoint_with_a_key(running: Deployment, said: str, tmp_path: Path) -> None:
    bundles, key = running.bundles, tmp_path / "key"
    at = ("--server", str(running.server.address), "--dealer", str(running.dealer.address))
    key.write_text("0123456789abcdef\n")
    exposed = ("--host", "0.0.0.0", "--expose", "--metrics", "0.0.0.0:0")
    with role("proxy", bundles, *at, "--plaintext", *exposed, "--api-key-file", str(key)) as made:
        made.wait_for("listening")
        # Each is one line, of the metrics and of the endpoint.
        reasons = [made.wait_for("exposed without encryption", n)["reason"] for n in (1, 2)]
        assert "reads names of clients, lengths and times" in reasons[0]
        assert "read the network sees prompts" in reasons[1]
        assert "--api-key-file" not in reasons[1], "which was given"
        base = f"http://127.0.0.1:{made.address.port}/v1"
        right, wrong = (
            openai.OpenAI(base_url=base, api_key=shown, max_retries=0, timeout=START)
            for shown in ("0123456789abcdef", "none")
        )
        answer = right.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, **SAME)
        assert answer.choices[0].text == said[:3]
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            wrong.models.list()
        check_the_page_asks_for_the_key(f"http://127.0.0.1:{made.address.port}", tmp_path)


def check_the_page_asks_for_the_key(url: str, folder: Path) -> None:
    """Once for a tab; a wrong one is said to be wrong."""
    with chromium(folder / "profile") as browser:

        def shown() -> str:
            return str(browser.find_element("id", "model").text)

        def asked() -> bool:
            with suppress(Exception):
                return bool(browser.switch_to.alert.text)
            return False

        for given, expected in (("none", "the API key is missing or wrong"), ("right", MODEL)):
            browser.get(url)
            wait_until(asked)
            browser.switch_to.alert.send_keys("0123456789abcdef" if given == "right" else given)
            browser.switch_to.alert.accept()
            wait_until(lambda expected=expected: shown().startswith(expected))
        browser.get(url)
        wait_until(lambda: shown() == MODEL)


# ------------------------------------------------------------------------- at the start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "0.0.0.0:8000 is reachable from other machines"),
        (("--port", "TAKEN"), "(Address already in use); choose another --port"),
    ],
)
def test_mistakes_at_the_start_are_one_line(
    bundles: Path, options: tuple[str, str], message: str, capsys: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [o.replace("TAKEN", str(taken.getsockname()[1])) for o in options]
        assert run(["proxy", str(bundles), "--plaintext", "--server", "127.0.0.1:1", *given]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert len(told.splitlines()) == 1
