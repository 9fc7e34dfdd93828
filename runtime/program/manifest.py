"""The manifest of a bundle: all facts about a program except its instructions and tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from mergec.runtime.core.errors import BundleError
from mergec.runtime.core.spec import (
    CHOICES,
    FRACTIONAL_BITS,
    MAX_DRAFTS,
    MAX_HEADS,
    MAX_NOISE,
    RING_BITS,
)
from mergec.runtime.program.generation_settings import GenerationSettings, cut
from mergec.runtime.program.json_values import canonical, is_a

FORMAT_VERSION = 2
"""Raised whenever an older runtime could misread a bundle."""

READABLE_VERSIONS = (1, 2)
"""Of version 1, the program hash covers neither the tokenizer nor the stop tokens, there are no
generation settings, roundings are public, and logits are revealed without noise."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The facts that a bundle states about its program, in the order of `manifest.json`.

    The compiler fills in the fields from `model` to `left_out`. Saving a bundle fills in the
    others, which an unsaved program may lack.

    Raises BundleError if a value is of another type than its field, if `weights`, `reveal` or
    `network` is none of `CHOICES`, if `logit_noise` is out of range, or if a generation setting
    names a token that does not exist.

    >>> Manifest(model="tiny", max_length=64).reveals_logits
    True
    """

    format_version: int = FORMAT_VERSION
    mergec_version: str = ""
    torch_version: str = ""
    role: str = ""
    ring_bits: int = RING_BITS
    program_hash: str = ""
    """SHA-256 of what all roles must agree on (`encoding.program_hash`), in hexadecimal."""
    model: str = ""
    fractional_bits: int = FRACTIONAL_BITS
    """Fractional bits of an activation after truncation."""
    max_length: int = 0
    """Most tokens of a prompt and its answer together; 0 for no limit."""
    vocab_size: int = 0
    """Number of tokens that the model knows; 0 if unknown."""
    stop_tokens: list[int] = field(default_factory=list)
    """Tokens that end an answer."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """The checkpoint's generation settings."""
    answer_start: int = -1
    """The token that every answer of an encoder-decoder begins with; -1 for a decoder."""
    pad_token: int = -1
    """The token that the client pads prompts with; -1 if the program takes no padding."""
    tokenizer: str = ""
    """SHA-256 of the client's tokenizer and chat template (`tokenizer_digest`); empty if there is
    no tokenizer."""
    lossy: bool = False
    """Whether a lossy pass changed the program."""
    deviation: dict[str, Any] = field(default_factory=dict)
    """Of a lossy program: its distance from the model (`measure_deviation`)."""
    weights: str = "server"
    """Who knows the weights while the program runs."""
    reveal: str = "logits"
    """What the client learns of a step."""
    logit_noise: float = 0.0
    """Standard deviation of the noise that the server adds to a revealed logit; 0 for none."""
    network: str = "loopback"
    """The network that protocols were chosen for."""
    rounding: str = "public"
    """Whether the client sees how intermediate values are rounded."""
    speculate_up_to: int = 0
    """Most drafted tokens that a step checks: up to so many positions after the first one, a step
    that follows cached tokens gives results at all of them. 0 for results at the last one alone."""
    medusa: int = 0
    """Heads that guess the tokens after the next one: at each position where a step gives a result,
    it gives theirs, too. All results of the first head come first, and the model's own last."""
    mode: str = "mergec"
    shapes: dict[str, Any] = field(default_factory=dict)
    """dtype and shape of each input and output, with `new` and `past` for the lengths of a step."""
    cost: dict[str, Any] = field(default_factory=dict)
    """Lengths, rounds and bytes of a prompt, a decode step, and the finish if there is one."""
    passes: list[dict[str, Any]] = field(default_factory=list)
    """The report of each pass that ran, in order."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why each other pass did not run, by name."""
    files: dict[str, Any] = field(default_factory=dict)
    """Size in bytes and SHA-256 of each file of the bundle, by name."""
    digest: str = ""
    """SHA-256 of the manifest's canonical JSON without this key."""

    def __post_init__(self) -> None:
        for key, kind in _KINDS.items():
            value = getattr(self, key)
            if not is_a(value, kind):
                raise BundleError(f"the manifest's {key} must be {kind.__name__}, not {cut(value)}")
        for key, kind in _ITEMS.items():
            wrong = [item for item in getattr(self, key) if not is_a(item, kind)]
            if wrong:
                raise BundleError(
                    f"the manifest's {key} must hold {kind.__name__}, not {cut(wrong[0])}"
                )
        for key, kind in _VALUES.items():
            for name, item in getattr(self, key).items():
                if not isinstance(name, str) or not is_a(item, kind):
                    raise BundleError(
                        f"the manifest's {key} must hold {kind.__name__}, not {cut(item)}"
                    )
        for key in ("fractional_bits", "max_length", "vocab_size"):
            if getattr(self, key) < 0:
                raise BundleError(f"the manifest's {key} is {cut(getattr(self, key))}")
        for name, step in self.cost.items():
            _check_record(f"cost of {cut(name)}", step, STEP)
        for entry in self.passes:
            _check_record("report of a pass", entry, _PASS)
            for skip in entry["skips"]:
                if not isinstance(skip, dict):
                    raise BundleError(f"the manifest's skips must hold dict, not {cut(skip)}")
                _check_record("skip of a pass", skip, _SKIP)
        if self.deviation:
            _check_record("deviation", self.deviation, _DEVIATION)
        for key, values in CHOICES.items():
            value = getattr(self, key)
            if value not in values:
                raise BundleError(
                    f"the manifest's {key} is {cut(value)}; it can be: {', '.join(values)}"
                )
        if not isinstance(self.generation, GenerationSettings):
            raise BundleError(
                f"the manifest's generation must be settings, not {cut(self.generation)}"
            )
        self.generation.check_tokens(self.vocab_size)
        if self.answer_start < -1 or 0 < self.vocab_size <= self.answer_start:
            raise BundleError(
                f"the manifest's answer_start is {cut(self.answer_start)}, which is not in the "
                f"vocabulary of {self.vocab_size}"
            )
        if self.pad_token < -1 or 0 < self.vocab_size <= self.pad_token:
            raise BundleError(
                f"the manifest's pad_token is {cut(self.pad_token)}, which is not in the "
                f"vocabulary of {self.vocab_size}"
            )
        if not 0 <= self.speculate_up_to <= MAX_DRAFTS:
            raise BundleError(
                f"the manifest's speculate_up_to is {self.speculate_up_to}; it can be 0 to "
                f"{MAX_DRAFTS}"
            )
        if not 0 <= self.medusa <= MAX_HEADS:
            raise BundleError(
                f"the manifest's medusa is {self.medusa}; it can be 0 to {MAX_HEADS} heads"
            )
        if not 0 <= self.logit_noise <= MAX_NOISE:
            raise BundleError(
                f"the manifest's logit_noise is {self.logit_noise}; it can be 0 to {MAX_NOISE:g}"
            )

    @property
    def arithmetic(self) -> dict[str, Any]:
        """How the parties compute, as arguments of `runtime.core.context.Context`."""
        return {"fixed": self.fractional_bits, "exact": self.rounding == "exact"}

    @property
    def reveals_logits(self) -> bool:
        """Whether the client learns a step's logits, and not the chosen token alone."""
        return self.reveal == "logits"

    def to_dict(self) -> dict[str, Any]:
        """The manifest as JSON values, in the order of `manifest.json`."""
        result: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _OPTIONAL and value == item.default:
                continue
            if not isinstance(value, GenerationSettings):
                result[item.name] = value
            elif value:
                result[item.name] = value.to_dict()
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned. Unknown keys are ignored: newer compilers may add some.

        Raises BundleError, naming the key, if one is missing or its value is of another type. A key
        that came with a later version of the format may be missing.
        """
        later = _SINCE_2 if data.get("format_version") == 1 else ()
        known = {key: kind for key, kind in _KINDS.items() if key not in later}
        known = {k: kind for k, kind in known.items() if k in data or k not in _OPTIONAL}
        for key, kind in known.items():
            if not is_a(data.get(key), kind):
                raise BundleError(f"{key!r} is missing or not {kind.__name__}")
        settings = {} if later else data.get("generation", {})
        if not is_a(settings, dict):
            raise BundleError("'generation' is not dict")
        generation = GenerationSettings.from_dict(settings)
        return cls(**{key: data[key] for key in known}, generation=generation)


def tokenizer_digest(files: Mapping[str, str]) -> str:
    """One SHA-256 for the files of a tokenizer, from the SHA-256 of each by name; "" for none."""
    return hashlib.sha256(canonical(dict(files))).hexdigest() if files else ""


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's canonical JSON, all keys but `digest` included, in hexadecimal."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(canonical(rest)).hexdigest()


_TYPES: dict[str, type] = {
    "int": int,
    "str": str,
    "bool": bool,
    "list": list,
    "dict": dict,
    "float": float,
}

_KINDS = {
    item.name: _TYPES[str(item.type).partition("[")[0]]
    for item in fields(Manifest)
    if item.name != "generation"
}
"""The JSON type of each field, from its annotation; settings check themselves."""

_SINCE_2 = ("logit_noise", "medusa", "rounding", "speculate_up_to", "tokenizer")
"""Fields that manifests of version 1 lack; their defaults hold there."""

_OPTIONAL = ("answer_start", "pad_token")
"""Fields that a manifest holds only if they are not at their defaults."""

_ITEMS: dict[str, type] = {"stop_tokens": int, "passes": dict}
"""The JSON type of a list's items."""


_VALUES: dict[str, type] = {"cost": dict, "left_out": str}
"""The JSON type of a dictionary's values."""

STEP: dict[str, type] = dict.fromkeys(("new", "past", "rounds", "online", "offline"), int)
"""What `Manifest.cost` says of each step."""

_PASS: dict[str, type] = {
    "pass": str, "summary": str, "exact": bool, "sites": int, "nodes_before": int,
    "nodes_after": int, "skips": list,
}  # fmt: skip
_SKIP: dict[str, type] = dict.fromkeys(("node", "module", "source", "reason"), str)
_DEVIATION: dict[str, type] = {
    "places": int, "agreed": int, "worst": float, "mean": float, "spread": float,
}  # fmt: skip


def _check_record(what: str, record: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raise BundleError unless a record has these keys; more keys are ignored.

    Numbers must be finite, and whole ones not negative.
    """
    for key, kind in kinds.items():
        value = record.get(key)
        fits = is_a(value, kind) or (kind is float and is_a(value, int))
        if kind in (int, float) and fits:
            number: Any = value
            fits = abs(number) < _LARGEST and (kind is float or number >= 0)
        if not fits:
            raise BundleError(
                f"the manifest's {what} needs {key} as {kind.__name__}, not {cut(value)}"
            )


_LARGEST = 1e300
"""Beyond any number that a program has; infinity and what is not a number are beyond it, too."""
