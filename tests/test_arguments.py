"""Every argument of the public functions is checked; a wrong one is named in one line."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergec import CompileConfig, Program, adapt, compile_decoder
from mergec.compiler.answer import Answer
from mergec.compiler.errors import CompileError
from mergec.runtime.core.errors import BundleError, MergecError, PromptError
from mergec.runtime.core.spec import ROLES
from tests.families import random_decoder
from tests.fixtures import decoder, greedy
from tests.test_program import TYPES


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@pytest.fixture
def program() -> Program:
    return Program({role: decoder(role) for role in ROLES}, TYPES)


def refused(call: Any, kind: type[MergecError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": "64"}, r"max_length is '64'; it must be a whole number, 2 to 4096"),
        ({"max_length": 64.5}, "max_length is 64.5; it must be a whole number"),
        ({"max_length": True}, "max_length is True"),
        ({"max_length": 1}, "max_length is 1; it can be 2 to 4096"),
        ({"max_length": float("nan")}, "max_length is nan"),
        ({"fractional_bits": "16"}, "fractional_bits is '16'"),
        ({"fractional_bits": 20}, "fractional_bits is 20; .* only 16"),
        ({"preset": None}, "preset is None; it must be a text"),
        ({"preset": ["exact"]}, "preset is a list"),
        ({"preset": "fast"}, "unknown preset 'fast'"),
        ({"weights": None}, "weights is None; it can be: server, shared"),
        ({"reveal": ["logits"]}, "reveal is a list; it can be"),
        ({"enable": "softmax_2quad"}, r"enable is 'softmax_2quad'; .*as \('softmax_2quad',\)"),
        ({"disable": None}, "disable is None"),
        ({"ignore_settings": "top_k"}, r"ignore_settings is 'top_k'; .*as \('top_k',\)"),
        ({"disable": (1,)}, "disable is a tuple; it must be a tuple of names"),
        ({"check_passes": "yes"}, "check_passes is 'yes'; it must be True, False or None"),
        ({"name": 3}, "name is 3; it must be a text"),
        ({"extra_passes": ("x",)}, "extra_passes must be a tuple of subclasses"),
        ({"calibration": [1, 2, 3]}, "calibration prompt 0 is 1; it must be a sequence of token"),
        ({"calibration": ((),)}, "calibration prompt 0 is empty"),
        ({"calibration": ("hello",)}, "calibration prompt 0 is 'hello'"),
        ({"calibration": ((1, -1.5),)}, "calibration prompt 0 holds -1.5 at place 1"),
        ({"calibration": None}, "calibration must be"),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], words: str) -> None:
    refused(lambda: CompileConfig(**options), CompileError, words)


def test_options_are_kept_as_documented() -> None:
    given = CompileConfig(enable=["softmax_2quad"], calibration=[torch.tensor([1, 2]), [3]])
    assert given == CompileConfig(enable=("softmax_2quad",), calibration=((1, 2), (3,)))
    assert pickle.loads(pickle.dumps(given)) == given
    assert hash(given)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": None}, "a NoneType is not a model"),
        ({"model": "gpt2"}, "a str is not a model"),
        ({"model": Tiny}, "a type is not a model"),
        ({"config": {"max_length": 64}}, "config is a dict, not a CompileConfig; make one"),
        ({"config": "exact"}, "config is 'exact', not a CompileConfig"),
        ({"tokenizer": "gpt2"}, "a str is not a tokenizer; load it first"),
        ({"tokenizer": object()}, "a object is not a tokenizer"),
        ({"tokenizer": CompileConfig()}, "pass options as config="),
        ({"progress": None}, "progress is None; it must be a function"),
        ({"captured": 3}, "captured is 3, not a Captured"),
        ({"config": CompileConfig(extra_passes=(int,))}, "int, which is not a subclass of merge"),
        ({"config": CompileConfig(enable=("nope",))}, "unknown pass 'nope'"),
        ({"config": CompileConfig(calibration=((1, 40),))}, "prompt 0 holds the token 40, which"),
    ],
)
def test_compile_decoder(arguments: dict[str, Any], words: str) -> None:
    refused(lambda: compile_decoder(**{"model": Tiny(), **arguments}), CompileError, words)


def test_calibration_longer_than_the_model_takes() -> None:
    class Short(Tiny):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            assert ids.shape[1] <= 8
            return super().forward(ids)

    config = CompileConfig(calibration=((1,) * 9,))
    refused(lambda: compile_decoder(Short(), config=config), CompileError, "has 9 tokens, but")


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([1.7], {}, "prompt holds 1.7 at place 0"),
        (["a"], {}, "prompt holds 'a' at place 0"),
        (None, {}, "prompt is None; it must be a sequence of token numbers"),
        (7, {}, "prompt is 7"),
        ([[1, 2], [3, 4]], {}, "prompt holds a list at place 0; .* only one text at a time"),
        (torch.tensor([[1, 2]]), {}, "prompt holds a Tensor at place 0"),
        (torch.tensor([1.5]), {}, "prompt holds a Tensor at place 0"),
        ({"input_ids": [1, 2]}, {}, "prompt is a dict; .*such as its input_ids"),
        ([True], {}, "prompt holds True"),
        ([], {}, "the prompt is empty"),
        ([-1], {}, "is -1; it can be 0 or more"),
        ([1], {"max_tokens": 0}, "max_tokens is 0; it can be 1 or more"),
        ([1], {"max_tokens": 1.5}, "max_tokens is 1.5; it must be a whole number"),
        ([1], {"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ([1], {"temperature": -1}, "temperature must be 0 or more"),
        ([1], {"temperature": float("nan")}, "temperature must be 0 or more"),
        ([1], {"top_k": 2.5}, "top_k is 2.5"),
        ([1], {"top_p": "all"}, "top_p is 'all'"),
        ([1], {"top_p": 0.0}, "top-p must be above 0"),
        ([1], {"seed": -1}, "seed is -1; it can be 0 to"),
        ([1], {"seed": 2**63}, "seed is 9223372036854775808"),
        ([1], {"mode": "x"}, "mode is 'x'; it can be: mergec, crypten"),
        ([1], {"device": None}, "device is None"),
        ([1], {"chat": "no"}, "chat is 'no'; it must be True, False or None"),
        ([1], {"chat": True}, "chat=True needs a text"),
        ([1], {"overlap": 1}, "overlap is 1; it must be True or False"),
        ([1], {"on_text": 3}, "on_text is 3; it must be a function"),
    ],
    ids=str,
)
def test_generate_local(program: Program, prompt: Any, options: dict[str, Any], words: str) -> None:
    refused(lambda: program.generate_local(prompt, **options), PromptError, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"new": "1"}, "new is '1'; it must be a whole number"),
        ({"new": 1.5}, "new is 1.5"),
        ({"new": -1}, "new is -1; it can be 0 or more"),
        ({"new": 0}, "`new` must be at least 1"),
        ({"past": -1}, "past is -1"),
        ({"past": 16}, "more than the 16"),
        ({"savings": "yes"}, "savings is 'yes'"),
    ],
)
def test_inspect(program: Program, arguments: dict[str, Any], words: str) -> None:
    refused(lambda: program.inspect(**arguments), PromptError, words)


def test_load_and_save(program: Program, tmp_path: Path) -> None:
    place = program.save(str(tmp_path / "a"))
    refused(lambda: program.save(None), BundleError, "path is None; it must be a path")
    refused(lambda: program.save(b"x"), BundleError, "path is a bytes")
    refused(lambda: program.save(place, 3), BundleError, "progress is 3")
    refused(lambda: Program.load(None), BundleError, "path is None")
    for roles, words in (
        ("client", r"roles is 'client'; .*as \('client',\)"),
        (("x",), "a role is 'x'; it can be: client, server, dealer"),
        ((), "roles is empty"),
        (3, "roles is 3"),
    ):
        refused(lambda roles=roles: Program.load(place, roles), BundleError, words)
    refused(lambda: program.plaintext([1, 2]), PromptError, "answer is a list, not a Answer")


WRONG = [
    *(None, "x", "", b"x", 5, -1, 10**30, 1.5, float("nan"), float("inf"), True, object()),
    *([], [None], ["x"], [5], (), {}, {"a": 1}),
]
"""Values of many types. Some of them are right for some parameters."""


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def only_our_errors(call: Any, *, said: str) -> None:
    """Call something that may succeed; every error has to be one of ours."""
    try:
        call()
    except MergecError:
        pass
    except Exception as error:  # noqa: BLE001  (the test is that there is none)
        pytest.fail(f"{said}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("name", parameters(CompileConfig))
def test_no_option_of_any_type_fails_later(name: str) -> None:
    for value in WRONG:
        try:
            config = CompileConfig(**{name: value})
        except CompileError:
            continue
        assert hash(config), "options are kept as immutable values"
        only_our_errors(lambda c=config: compile_decoder(Tiny(), config=c), said=f"{value!r}")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method in ("generate_local", "inspect", "to_html", "audit", "check", "plaintext")
        for name in parameters(getattr(Program, method))[1:]
    ],
)
def test_no_argument_of_any_type_fails_inside(
    program: Program, method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_place", lambda: Path("nowhere"))
    needed = {"prompt": [1, 2]} if method == "generate_local" else {}
    for value in WRONG:
        call = partial(getattr(program, method), **{**needed, name: value})
        only_our_errors(call, said=f"{value!r}")


@pytest.mark.parametrize("name", parameters(adapt))
def test_no_argument_of_an_adaptation_fails_inside(name: str, tmp_path: Path) -> None:
    given = {"model": Tiny(), "data": tmp_path / "no.txt", "output": tmp_path / "new"}
    for value in WRONG:
        only_our_errors(partial(adapt, **{**given, name: value}), said=f"{value!r}")


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_of_a_program(program: Program, tmp_path: Path, how: Any) -> None:
    program.save(tmp_path / "a")
    for source in (program, Program.load(tmp_path / "a")):
        made = how(source)
        assert (made.path, made.history) == (None, None)
        assert made.describe() == source.describe()
        assert str(made.graph) == str(source.graph)
        expected = greedy([3, 5], 4)
        assert made.plaintext(Answer("", [3, 5], expected)).tokens == expected
        made.save(tmp_path / "b")
        for file in (tmp_path / "a").rglob("*.*"):
            other = tmp_path / "b" / file.relative_to(tmp_path / "a")
            assert file.read_bytes() == other.read_bytes(), file.name


def test_threads_that_compile() -> None:
    """Neither disturbs the other, nor what is compiled later."""
    models = [Tiny(), random_decoder("gpt2", n_layer=1).float()]
    config = CompileConfig(max_length=32)
    found: dict[int, str] = {}
    failed: list[Exception] = []

    def work(index: int) -> None:
        try:
            program = compile_decoder(models[index], config=config)
            found[index] = program.manifest.program_hash
        except Exception as error:  # noqa: BLE001  (raised in the main thread)
            failed.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    alone = [compile_decoder(model, config=config).manifest.program_hash for model in models]
    assert [found[0], found[1]] == alone
