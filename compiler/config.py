"""Options of a compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergec.compiler.errors import CompileError
from mergec.runtime.core.spec import CHOICES

_MPCFORMER = ("quadratic_gelu", "quadratic_silu")

PRESETS: dict[str, tuple[str, ...]] = {
    "exact": (),
    "mpcformer-2quad": (*_MPCFORMER, "softmax_2quad"),
    "mpcformer-2relu": (*_MPCFORMER, "softmax_2relu"),
    "merge-er": ("resend_hidden",),
    "merge-mm": ("fix_attention", "merge_projections"),
    "merge": ("resend_hidden", "fix_attention", "merge_projections"),
    "thex": ("relu_activations", "softmax_2relu", "simplify_norms"),
}
"""Lossy passes that may be asked for by name, beside all exact ones; `exact` asks for none."""

MAX_LENGTH = 4096
"""Longest row of attention scores that the softmax takes."""


PAST = 128
"""Tokens before the step that is inspected, where nothing is said and so many are allowed."""


@dataclass(frozen=True)
class CompileConfig:
    """How to compile a decoder; an unknown option is a TypeError.

    fractional_bits: of every fixed-point number; the tables of the protocols are made for 16.
    max_length: most tokens of prompt and answer together; the model's own limit if that is lower.
    preset: which lossy passes run, beside the exact ones; see PRESETS.
    enable: names of further lossy passes to run.
    weights: "server" leaves them in the clear at the server, which is cheapest; "shared" has the
        server secret-share them at the start of a session, the setting of MERGE and CrypTen.
    reveal: "logits" tells the client the logits of each step, "token" the chosen token alone.
    network: the network that protocols are chosen for, where one takes more bytes and another more
        rounds.
    disable: names of passes to leave out.
    extra_passes: further Pass classes, run in the order of their stage.
    check_passes: whether to run the graph in float64 before and after an exact pass, and raise
        InternalError if an output changes. True does so for each pass, False for none; by default,
        None, for passes from outside of mergec: extra_passes, and those of other packages.
    calibration: token sequences whose values tell how large each wire gets; by default fixed
    pseudo-random ones, or the tokenizer's of a few sentences where there is a tokenizer.
    name: what the program is called in reports; the model's own name by default.
    """

    fractional_bits: int = 16
    max_length: int = 1024
    preset: str = "exact"
    enable: tuple[str, ...] = ()
    weights: str = "server"
    reveal: str = "logits"
    network: str = "loopback"
    disable: tuple[str, ...] = ()
    extra_passes: tuple[Any, ...] = ()
    check_passes: bool | None = None
    calibration: tuple[tuple[int, ...], ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if self.fractional_bits != 16:
            raise CompileError(
                f"fractional_bits is {self.fractional_bits}; the protocols' tables are made for 16"
            )
        if not 2 <= self.max_length <= MAX_LENGTH:
            raise CompileError(f"max_length is {self.max_length}; it can be 2 to {MAX_LENGTH}")
        if self.preset not in PRESETS:
            raise CompileError(f"unknown preset {self.preset!r}; there are: {', '.join(PRESETS)}")
        for option, values in CHOICES.items():
            if (given := getattr(self, option)) not in values:
                raise CompileError(f"{option} is {given!r}; it can be: {', '.join(values)}")
