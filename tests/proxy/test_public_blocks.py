"""Public blocks at the endpoint: requests choose what they combine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mergec.runtime.cli import run
from mergec.runtime.cli.exits import FAILED
from tests import characters
from tests.services import START, Deployment, deployment, role
from tests.test_public_blocks import plaintext

openai = pytest.importorskip("openai", reason="the openai package is not installed")
httpx = pytest.importorskip("httpx2", reason="comes with openai")

HEAD, BLOCKS = "be big", ["a cab ", "dig", "high "]
COUNT = 4
ASKED = {"model": "tiny", "max_tokens": COUNT, "temperature": 0}
HI = [{"role": "user", "content": "a"}]


def written(folder: Path) -> list[str]:
    """Options that name the public text and its blocks, in files below a folder."""
    options = []
    for number, text in enumerate((HEAD, *BLOCKS)):
        file = folder / f"public{number}.txt"
        file.write_text(text)
        options += ["--public-block" if number else "--public-prompt", str(file)]
    return options


@contextmanager
def started(folder: Path, chat: str | None) -> Iterator[tuple[Deployment, Any]]:
    """Services whose server knows the blocks, and an app's client of an endpoint with them."""
    bundles = characters.save(folder / "bundles", chat=chat)
    public = written(folder)
    with (
        deployment(bundles, serve=("--timeout", str(START), *public)) as made,
        role("proxy", bundles, *where(made), *public) as endpoint,
    ):
        url = f"http://{endpoint.address}/v1"
        yield made, openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=START)


def where(made: Deployment) -> list[str]:
    addresses = ("--server", str(made.server.address), "--dealer", str(made.dealer.address))
    return [*addresses, "--plaintext"]


def expected(bundles: Path, order: Sequence[int], secret: str) -> str:
    """The greedy answer in the clear to a text behind the head and some blocks."""
    blocks = [characters.ids(BLOCKS[n]) for n in order]
    tokens = plaintext(bundles, characters.ids(HEAD), blocks, characters.ids(secret), COUNT)
    assert characters.STOP not in tokens
    return "".join(characters.SYMBOLS[token] for token in tokens)


def cached(found: Any) -> int:
    return int(found.usage.prompt_tokens_details.cached_tokens)


def length(order: Sequence[int]) -> int:
    return len(HEAD) + sum(len(BLOCKS[n]) for n in order)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, Any]]:
    with started(tmp_path_factory.mktemp("blocks"), characters.CHAT) as made:
        yield made


def test_chats_combine_all_blocks_or_those_that_they_name(
    chatting: tuple[Deployment, Any],
) -> None:
    made, client = chatting
    for order in (None, [1], [2, 0], []):
        body = {} if order is None else {"public_blocks": order}
        for more in ([], [{"role": "system", "content": HEAD}]):
            found = client.chat.completions.create(messages=[*more, *HI], extra_body=body, **ASKED)
            if order == []:
                whole = "".join(f"{message['content']} " for message in [*more, *HI])
                assert found.choices[0].message.content == characters.plaintext(
                    made.bundles, whole, COUNT
                )
                continue
            chosen = range(len(BLOCKS)) if order is None else order
            assert found.choices[0].message.content == expected(made.bundles, chosen, " a ")
            assert found.usage.prompt_tokens == length(chosen) + len(" a ")
            # Of a prompt that was asked before, all but its last token.
            assert cached(found) == length(chosen) + (2 if more else 0)


def test_the_next_turn_continues_the_blocks(chatting: tuple[Deployment, Any]) -> None:
    made, client = chatting
    body = {"public_blocks": [2, 1]}
    turns = [{"role": "user", "content": "bad"}]
    first = client.chat.completions.create(messages=turns, extra_body=body, **ASKED)
    said = first.choices[0].message.content
    turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "b"}]
    stream = client.chat.completions.create(
        messages=turns,
        extra_body=body,
        stream=True,
        stream_options={"include_usage": True},
        **ASKED,
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected(made.bundles, [2, 1], f" bad {said} b ")
    assert cached(chunks[-1]) == first.usage.total_tokens - 1


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"public_blocks": [3]}, "invalid_value", "this endpoint has 3 blocks, numbered from 0"),
        ({"public_blocks": [1, 1]}, "invalid_value", "public_blocks: names a block twice"),
        ({"public_blocks": [-1]}, "invalid_value", "public_blocks.0: must be at least 0"),
        ({"public_blocks": [True]}, "invalid_value", "public_blocks.0: must be a whole number"),
        ({"public_blocks": "1"}, "invalid_value", "public_blocks: must be a list"),
        (
            {"messages": [{"role": "system", "content": "be bad"}, *HI]},
            "prompt_refused", "public blocks continue the public text as the system message",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(
    chatting: tuple[Deployment, Any], body: dict[str, Any], code: str, message: str
) -> None:
    asked = {"messages": HI, "extra_body": body, **ASKED}
    with pytest.raises(openai.BadRequestError) as refused:
        chatting[1].chat.completions.create(**asked)
    assert refused.value.code == code
    assert message in refused.value.message
    assert "\n" not in refused.value.message
    assert chatting[1].chat.completions.create(messages=HI, **ASKED).choices


def test_completions_of_a_model_with_a_template(chatting: tuple[Deployment, Any]) -> None:
    """Blocks continue its system message, which completions do not have."""
    made, client = chatting
    found = client.completions.create(prompt="ab", **ASKED)
    assert found.choices[0].text == characters.plaintext(made.bundles, "ab", COUNT)
    with pytest.raises(openai.BadRequestError, match="come before the messages of a chat here"):
        client.completions.create(prompt="ab", extra_body={"public_blocks": [0]}, **ASKED)


def test_completions_of_a_model_without_one(tmp_path: Path) -> None:
    with started(tmp_path, None) as (made, client):
        for order in (None, [1, 2]):
            body = {} if order is None else {"public_blocks": order}
            chosen = range(len(BLOCKS)) if order is None else order
            found = client.completions.create(prompt="ab", extra_body=body, **ASKED)
            assert found.choices[0].text == expected(made.bundles, chosen, "ab")
            assert cached(found) == length(chosen)
        ids = characters.ids("ab")
        found = client.completions.create(prompt=ids, **ASKED)
        assert found.choices[0].text == characters.plaintext(made.bundles, "ab", COUNT)
        with pytest.raises(openai.BadRequestError, match="come before a text here"):
            client.completions.create(prompt=ids, extra_body={"public_blocks": [0]}, **ASKED)


def test_an_endpoint_without_blocks_has_none_to_name(
    chatting: tuple[Deployment, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = chatting
    with role("proxy", made.bundles, *where(made)) as endpoint:
        url = f"http://{endpoint.address}"
        assert httpx.get(f"{url}/about", timeout=START).json()["public_blocks"] == 0
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=START)
        asked = {"messages": HI, **ASKED}
        with pytest.raises(openai.BadRequestError, match="start it with --public-block"):
            client.chat.completions.create(extra_body={"public_blocks": [0]}, **asked)
        none = client.chat.completions.create(extra_body={"public_blocks": []}, **asked)
        assert none.choices == client.chat.completions.create(**asked).choices
    other = tmp_path / "other.txt"
    other.write_text("ice ")
    assert run(["proxy", str(made.bundles), *where(made), "--public-block", str(other)]) == FAILED
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "is none that the server agrees to" in line
