"""The server's weights as integers, and which tensors a program drops when they are taken."""

from __future__ import annotations

import torch

from mergec.runtime.core.spec import Vis
from mergec.runtime.engine.weights import take_weights
from mergec.runtime.program.program import Instruction, Ref
from tests.fixtures import decoder, tiny


def test_each_weight_is_held_once_as_integers() -> None:
    program = decoder("server")
    floats = dict(program.tensors)
    taken = take_weights(program)
    assert not program.tensors, "nothing else reads them"
    assert taken["embed.weight"] is taken["head.weight"], "tied weights are one tensor"
    for name, words in taken.items():
        assert words.dtype is torch.int32
        assert torch.equal(words, torch.round(floats[name] * 2**16).to(torch.int32))


def test_words_that_need_it_are_wide() -> None:
    program = decoder("server", fractional_bits=20)
    program.tensors["up.weight"] = program.tensors["up.weight"] * 2.0**12
    taken = take_weights(program)
    assert taken["up.weight"].dtype is torch.int64
    assert taken["embed.weight"].dtype is torch.int32


def test_what_is_read_in_the_clear_stays() -> None:
    program = tiny("server")
    double = Instruction("double", "aten.mul.Tensor", (Ref("up.weight"), 2.0), {}, Vis.SERVER, 0)
    program.instructions.append(double)
    taken = take_weights(program)
    assert {"embed.weight", "up.weight", "head.weight"} <= set(taken)
    assert {"cos", "up.weight"} <= set(program.tensors)
    assert "embed.weight" not in program.tensors


def test_other_roles_have_none() -> None:
    assert not take_weights(decoder("client"))
