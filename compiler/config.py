"""Options of a compilation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergec.compiler.errors import CompileError
from mergec.runtime.core.arguments import Arguments
from mergec.runtime.core.spec import CHOICES, MAX_DRAFTS, MAX_NOISE

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
"""The lossy passes that each preset adds to the exact ones; `exact` adds none."""

MAX_LENGTH = 4096
"""Longest row of attention scores that the softmax supports, in tokens."""

DEFAULT_LENGTH = 1024
"""Most tokens of prompt and answer together, of a model that can take as many."""

DEFAULT_NOISE = 2.0**-8
"""Standard deviation of the noise in a logit, chosen by two tables: benchmarks/rounding_attack.py
says how far it sets the attack back, benchmarks/exactness.py whether it changes a token."""

PAST = 128
"""Default number of tokens before an inspected step, where the program allows that many."""


@dataclass(frozen=True)
class Pair:
    """A source, and its answer as the decoder reads it, which begins with the model's first token.

    It has no length, so that nothing takes it for a sequence of two tokens.
    """

    source: tuple[int, ...]
    answer: tuple[int, ...]


Sample = Sequence[int] | Pair
"""Token numbers on which the compiler runs a model."""


def as_pair(sample: Sample) -> Pair:
    """Source and answer of a sample; a sequence of tokens is its own answer."""
    return sample if isinstance(sample, Pair) else Pair(tuple(sample), tuple(sample))


@dataclass(frozen=True)
class CompileConfig:
    """How to compile a decoder. All options have defaults.

    fractional_bits: bits after the binary point of every fixed-point number. Only 16 is supported,
        because the tables of the protocols are built for 16.
    max_length: most tokens of prompt and answer together, 2 to 4096. By default 1024, or the
        model's own limit if that is lower.
    preset: the lossy passes to run in addition to the exact ones: "exact" (none, the default),
        "mpcformer-2quad", "mpcformer-2relu", "thex", "merge-er", "merge-mm" or "merge".
    enable: names of further lossy passes to run.
    weights: "server" (the default) keeps the weights in the clear at the server, which is cheapest.
        With "shared", the server secret-shares them at the start of a session, the setting used in
        the benchmarks of the MERGE and CrypTen papers.
    reveal: what the client learns from each step: "logits" (the default), or "token" for the chosen
        token alone.
    logit_noise: with reveal="logits", the standard deviation of normal noise that the server adds
        to every logit, so that the client cannot read the model off the roundings of intermediate
        values (docs/rounding.md). 0 adds none; at most 1/16. Default 1/256.
    network: the network for which protocols are chosen, where an op can trade bytes for rounds:
        "loopback" (the default; no latency, 2 GB/s), "lan" (0.25 ms one way, 1 Gbit/s), "wan" (a
        client 20 ms away, over 100 Mbit/s, and a dealer in the server's region) or "wan3" (all
        three roles 20 ms apart, over 100 Mbit/s). It changes costs, never results.
    rounding: who sees how intermediate values are rounded. With "public" (the default) both parties
        do: this is cheapest, and over many queries a client can estimate weights from it (see the
        threat model). With "exact" the server answers the client's masked shares with their high
        bits alone, so that no rounding depends on anything that the client sees. It takes about
        twice the rounds.
    speculate_up_to: most drafted tokens that one step checks, 0 to 31; 0 (the default) for programs
        that answer one token a step. A step of up to so many drafts and the token before them gives
        the client the logits (or the token) at each of its positions; prompts and steps of one
        token cost what they cost without. Needs a program with caches.
    pad_prompt: let the client hide how long a prompt is: programs take a number that only the
        client knows, of tokens on the left that no other token attends to. How far prompts are
        padded is chosen when they run (docs/threat-model.md, "Lengths"). For decoders with exact
        attention; learned absolute positions then become private look-ups.
    disable: names of passes to leave out.
    extra_passes: further Pass classes to run, in the order given by their `stage` and `after`.
    check_passes: whether to run the graph in float64 before and after each exact pass, and raise
        InternalError if an output changes. True checks all passes, False none. None (the default)
        checks the passes from outside of mergec: extra_passes, and those of other packages.
    calibration: prompts as sequences of token numbers; of an encoder-decoder, also `Pair`s of a
        source and its answer (a prompt alone is read as both). The compiler runs the model on them
        to measure how large each value gets, and lossy passes take their constants from them. By
        default a few fixed sentences in the model's tokens and one sequence of tokens spread over
        the vocabulary; without a tokenizer, only sequences of the second kind.
    adapted: the folder that `mergec adapt` wrote, if the model comes from there. The program gets
        the preset and the passes that the model was trained for, and their trained constants,
        and is calibrated on prompts of the text that it was trained on. With heads of
        `mergec adapt --medusa`, it checks at least as many drafts a step as there are heads.
        `mergec compile FOLDER` sets this by itself.
    ignore_settings: names of settings in the model's generation_config to leave out of the program.
        Settings that cannot be honoured are refused unless they are named here.
    name: the program's name in reports; by default the model's own name.

    Raises:
        CompileError: an option has a value that is not allowed.
        TypeError: there is no option of that name.

    Example:
        >>> config = CompileConfig(max_length=256, network="wan", reveal="token")
        >>> config.preset, config.rounding
        ('exact', 'public')
    """

    fractional_bits: int = 16
    max_length: int | None = None
    preset: str = "exact"
    enable: tuple[str, ...] = ()
    weights: str = "server"
    reveal: str = "logits"
    logit_noise: float = DEFAULT_NOISE
    network: str = "loopback"
    rounding: str = "public"
    speculate_up_to: int = 0
    pad_prompt: bool = False
    disable: tuple[str, ...] = ()
    extra_passes: tuple[Any, ...] = ()
    check_passes: bool | None = None
    calibration: tuple[tuple[int, ...] | Pair, ...] = ()
    adapted: str | Path = ""
    ignore_settings: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        check = Arguments(CompileError)
        check.whole("fractional_bits", self.fractional_bits, 0)
        if self.fractional_bits != 16:
            raise CompileError(
                f"fractional_bits is {self.fractional_bits}; the protocols' tables support only 16"
            )
        length = self.max_length
        if length is not None:
            length = check.whole("max_length", length, 2, MAX_LENGTH)
        if check.text("preset", self.preset) not in PRESETS:
            raise CompileError(f"unknown preset {self.preset!r}; there are: {', '.join(PRESETS)}")
        noise = self.logit_noise
        if not isinstance(noise, (int, float)) or not 0 <= noise <= MAX_NOISE:
            raise CompileError(
                f"logit_noise is {noise!r}; it can be 0 (none) to {MAX_NOISE:g}, the standard "
                "deviation of what is added to a logit"
            )
        for option, values in CHOICES.items():
            check.choice(option, getattr(self, option), values)
        check.flag("check_passes", self.check_passes, or_none=True)
        check.flag("pad_prompt", self.pad_prompt)
        check.text("name", self.name)
        adapted = str(self.adapted) if isinstance(self.adapted, Path) else self.adapted
        kept = {
            "max_length": length,
            "speculate_up_to": check.whole("speculate_up_to", self.speculate_up_to, 0, MAX_DRAFTS),
            "adapted": check.text("adapted", adapted),
            "enable": check.names("enable", self.enable),
            "disable": check.names("disable", self.disable),
            "ignore_settings": check.names("ignore_settings", self.ignore_settings),
            "extra_passes": _classes(self.extra_passes),
            "calibration": _prompts(check, self.calibration),
        }
        asked = {*PRESETS[self.preset], *self.enable}
        if self.speculate_up_to and "resend_hidden" in asked:
            raise CompileError(
                "speculate_up_to needs tokens after each step, and resend_hidden gives them only "
                "at the end; leave one of them out"
            )
        if self.pad_prompt and "resend_hidden" in asked:
            raise CompileError(
                "prompts of a program that resends its hidden state cannot be padded; leave out "
                "pad_prompt or resend_hidden"
            )
        for option, value in kept.items():
            object.__setattr__(self, option, value)


def _classes(given: Any) -> tuple[Any, ...]:
    if not isinstance(given, (tuple, list)) or not all(isinstance(kind, type) for kind in given):
        raise CompileError("extra_passes must be a tuple of subclasses of mergec.Pass")
    return tuple(given)


def _prompts(check: Arguments, given: Any) -> tuple[tuple[int, ...] | Pair, ...]:
    """Calibration prompts and pairs, none of them empty."""
    if isinstance(given, (str, bytes)) or not hasattr(given, "__len__"):
        raise CompileError("calibration must be a sequence of prompts, as ((1, 2, 3), (4, 5))")

    def checked(name: str, prompt: Any) -> tuple[int, ...]:
        tokens = check.tokens(name, prompt)
        if not tokens:
            raise CompileError(f"{name} is empty; give at least one token number")
        return tuple(tokens)

    prompts: list[tuple[int, ...] | Pair] = []
    for position, prompt in enumerate(given):
        name = f"calibration prompt {position}"
        if isinstance(prompt, Pair):
            source = checked(f"the source of {name}", prompt.source)
            prompts.append(Pair(source, checked(f"the answer of {name}", prompt.answer)))
        else:
            prompts.append(checked(name, prompt))
    return tuple(prompts)
