"""An encoder-decoder as it is deployed: server, dealer, client, endpoint, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.runtime.cli import run
from mergec.runtime.core.errors import PromptError
from mergec.runtime.session.requests import Plan
from mergec.runtime.session.stores.reader import Store
from tests.encoder_decoders import SOURCES, VOCAB, answer_of, model_and_step
from tests.services import START, Deployment, answered, deployment, role

pytestmark = pytest.mark.slow

TOKENS = 4
END = 1
KEY = b"k" * 32


def tokenizer() -> Any:
    """Numbers as words, and an end of the source, as T5's own tokenizer adds it."""
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": END} | {f"w{n}": n for n in range(2, VOCAB)}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, captured = model_and_step("t5")
    config = CompileConfig(max_length=40, name="tiny-t5")
    program = compile_decoder(model, tokenizer(), config, captured=captured)
    return program.save(tmp_path_factory.mktemp("t5") / "bundles")


@pytest.fixture(scope="module")
def running(bundles: Path) -> Iterator[Deployment]:
    key = bundles / "key"
    key.write_text(KEY.hex())
    stores = ("--stores", str(bundles / "stores"), "--store-key", str(key))
    with deployment(bundles, serve=("--timeout", str(START), *stores)) as made:
        yield made


def test_a_session_translates_source_after_source(running: Deployment) -> None:
    model, _ = model_and_step("t5")
    with running.connection(timeout=START) as connection:
        for source in SOURCES:
            tokens, new = answered(connection, list(source), TOKENS)
            assert tokens == answer_of(model, source, TOKENS)
            assert new == [len(source), *[1] * (TOKENS - 1)]
        again, _ = answered(connection, list(SOURCES[0]), TOKENS)
        assert again == answer_of(model, SOURCES[0], TOKENS)
        assert connection.cached(SOURCES[0]) == 0, "no caches are continued"


def test_answers_from_a_store(running: Deployment, tmp_path: Path) -> None:
    """The source's step and those after it, for two sources of one length, without the dealer."""
    model, _ = model_and_step("t5")
    source = list(SOURCES[0])
    plan = Plan(2, len(source), TOKENS - 1)
    place, _ = running.connection(timeout=START).prepare(plan, tmp_path / "stores", KEY)
    store = Store.open(place, KEY)
    with running.connection(timeout=START, dealer=None, store=store) as connection:
        for length in (len(source) - 1, len(source) + 1):
            with pytest.raises(PromptError, match=f"takes a source of {len(source)} tokens"):
                next(connection.generate([7] * length, max_tokens=1))
        for other in (source, source[::-1]):
            tokens, new = answered(connection, other, TOKENS)
            assert tokens == answer_of(model, other, TOKENS)
            assert new == [len(source), *[1] * (TOKENS - 1)]
        with pytest.raises(PromptError, match="is used up"):
            next(connection.generate(source, max_tokens=1))


def test_the_endpoint_completes(running: Deployment) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    model, _ = model_and_step("t5")
    wanted = answer_of(model, [5, 9, 33, END], TOKENS)
    at = ("--server", str(running.server.address), "--dealer", str(running.dealer.address))
    with role("proxy", running.bundles, *at, "--plaintext") as proxy:
        url = f"http://{proxy.address}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=START)
        asked = {"model": "tiny-t5", "max_tokens": TOKENS, "temperature": 0}
        said = client.completions.create(prompt="w5 w9 w33", **asked)
        assert said.choices[0].text == " ".join(f"w{token}" for token in wanted)
        assert said.usage.prompt_tokens == 4
        with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
            client.chat.completions.create(messages=[{"role": "user", "content": "w5"}], **asked)


def test_the_command_line(running: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = model_and_step("t5")
    wanted = answer_of(model, [5, 9, END], TOKENS)
    at = ["--server", str(running.server.address), "--dealer", str(running.dealer.address)]
    bundle = str(running.bundles)
    assert (
        run(["generate", bundle, "--prompt", "w5 w9", "--max-tokens", "4", *at, "--plaintext"]) == 0
    )
    assert " ".join(f"w{token}" for token in wanted) in capsys.readouterr().out
    assert run(["audit", bundle]) == 0
    assert "of which the source has half" in capsys.readouterr().out


def test_what_is_for_decoders_alone_is_refused(
    running: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    connection = running.connection()
    with pytest.raises(PromptError, match="encoder reads a prompt as a whole"):
        running.connection(public_prefixes=[[5, 6]])
    with pytest.raises(PromptError, match="speculate"):
        next(connection.generate([5, 6], speculate="lookup"))
    known = tmp_path / "public.json"
    known.write_text("[5, 6]")
    more = ["--plaintext", "--listen", "127.0.0.1:0", "--dealer", "127.0.0.1:1"]
    assert run(["serve", str(running.bundles), "--public-prompt", str(known), *more]) == 1
    said = capsys.readouterr().err
    assert "encoder reads a prompt as a whole" in said
    assert len(said.strip().splitlines()) == 1
