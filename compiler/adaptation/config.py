"""Options of an adaptation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from mergec.compiler.config import PRESETS
from mergec.compiler.errors import CompileError
from mergec.runtime.core.arguments import Arguments
from mergec.runtime.core.spec import MAX_HEADS

TRAINABLE = tuple(name for name in PRESETS if name != "exact")
"""The presets that there is something to train for."""

FORMATS = ("auto", "text", "jsonl", "multiwoz", "commongen", "dailydialog")
RECIPES = ("paper", "as-run")
OBJECTIVES = ("data", "teacher")
SCHEDULES = ("constant", "linear")

RECIPE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": MappingProxyType({"noise": 0.7, "dropout": 0.6, "evaluate_training": False}),
        "as-run": MappingProxyType({"noise": 0.2, "dropout": 0.7, "evaluate_training": True}),
    }
)
"""Of MERGE: noise and dropout of embeddings, and whether validation runs with both.

The paper's scripts pass `--dropout_rate` twice, the second time with the value that is meant for
the noise. So the noise keeps its default, 0.2, and its value becomes the dropout.
"""


@dataclass(frozen=True)
class AdaptConfig:
    """How to adapt a model. All options have defaults; those of MERGE are its paper's.

    preset: the lossy passes to train for; any but "exact". By default "merge". enable: names of
        further lossy passes.
    medusa: instead of a preset: train so many heads, 1 to 8, that guess the tokens after the next
        one, beside the model as it is.
    medusa_layers: residual blocks of each head, 1 or 0. A block takes rounds of its own.
    format: of the data file; by default found from its name and contents (docs/guides/
        adaptation.md). separator: what stands between a prompt and its answer; leave it out for an
        encoder-decoder, which reads the prompt as its source. chat: render prompts
        by the tokenizer's chat template instead. length: most tokens of a text, prompt and answer
        together; also the size of attention tables.
    validation: the share of the data that is kept for validation, if there is no file for it.
    steps, batch, accumulate: steps of the optimizer, and the texts of each: `batch` at a time,
        `accumulate` times.
    learning_rate, weight_decay, clip, warmup: of AdamW; the largest norm of a gradient; the steps
        over which the rate rises from 0. By default 8e-5, and 1e-3 for heads. schedule: afterwards
        the rate is "constant", as the paper's, or falls in a "linear" way to 0 at the last step,
        which suits short runs.
    objective: "data" trains on the data's tokens, "teacher" in two stages on the model's own
        layers, then on its logits. By default "data" for MERGE's presets, else "teacher".
    cosine: λ in (1 - λ) · cross entropy + λ · (1 - cos(h, E[next token])), where hidden states are
        resent; 0 leaves out the second term.
    recipe: of MERGE, where noise and dropout are not given: "paper" is what the paper describes,
        noise 0.7, dropout 0.6; "as-run" is what its scripts do, noise 0.2, dropout 0.7, and
        validation with both.
    noise, dropout: of embeddings while training: uniform noise in ±noise, then dropout. By default
        those of the recipe for MERGE's presets, else 0. The recipe's noise is for GPT-2, whose
        embedding has a root mean square of 0.14.
    resent: where hidden states are resent, how often each training step runs the model again with
        its own hidden states in place of the answer's embeddings. MERGE does not: 0, the default.
    resent_ramp: the share of the steps over which these rows move from the embedding to the hidden
        state. A text that grows in the layers moves less far. 0, the default: all rows are hidden
        states from the first step on.
    match_scale: where hidden states are resent, scale the last norm before the training so that
        they are as large as embeddings, and the head so that no logit changes
        (`adaptation/scale.py`). MERGE does not: False, the default.
    freeze: patterns of names of parameters that stay as they are, as "*mlp.up_proj*"; training
        takes less time and memory. Names are those of the model, patterns those of `fnmatch`.
    layer_steps: the share of the steps that train on layers, with objective="teacher".
    layer_weight: what the distance from the teacher's layers is multiplied by before it is added to
        the loss of all other steps, with either objective; 0, the default, leaves it out.
    temperature: of the logits that are compared with the teacher's.
    bf16: while training, compute products from bfloat16 copies of their operands (torch's
        autocast). Weights, the optimizer's state and all measures stay float32.
    seed, device: device is "cpu", "cuda", or "auto".
    evaluate_every, save_every, log_every: steps between validations, checkpoints, progress lines;
        by default a tenth, a tenth and a fiftieth of the steps.
    samples, answer: prompts that are answered for each validation, and tokens of each answer.

    Raises CompileError for an option whose value is not allowed.

    Example:
        >>> AdaptConfig(preset="merge-mm", steps=2_000, batch=8).length
        128
    """

    preset: str = ""
    enable: tuple[str, ...] = ()
    medusa: int | None = None
    medusa_layers: int = 1
    format: str = "auto"
    separator: str = "\n"
    chat: bool = False
    length: int = 128
    validation: float = 0.05
    steps: int = 50_000
    batch: int = 16
    accumulate: int = 1
    learning_rate: float | None = None
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 0
    schedule: str = "constant"
    objective: str | None = None
    cosine: float = 0.75
    recipe: str = "paper"
    noise: float | None = None
    dropout: float | None = None
    resent: int = 0
    resent_ramp: float = 0.0
    match_scale: bool = False
    freeze: tuple[str, ...] = ()
    layer_steps: float = 0.5
    layer_weight: float = 0.0
    temperature: float = 1.0
    bf16: bool = False
    seed: int = 0
    device: str = "auto"
    evaluate_every: int | None = None
    save_every: int | None = None
    log_every: int | None = None
    samples: int = 32
    answer: int = 16

    def __post_init__(self) -> None:
        check = Arguments(CompileError)
        check.text("preset", self.preset)
        medusa = self.medusa
        if medusa is not None:
            medusa = check.whole("medusa", medusa, 1, MAX_HEADS)
            object.__setattr__(self, "medusa", medusa)
        layers = check.whole("medusa_layers", self.medusa_layers, 0, 1)
        object.__setattr__(self, "medusa_layers", layers)
        if not self.preset:
            object.__setattr__(self, "preset", "exact" if medusa else "merge")
        if medusa and (self.preset != "exact" or self.enable):
            raise CompileError(
                "heads are trained beside the model as it is; leave out preset and enable, or "
                "leave out medusa"
            )
        if not medusa and self.preset == "exact":
            raise CompileError(
                "the preset 'exact' computes what the model does, so there is nothing to train; "
                f"choose one of: {', '.join(TRAINABLE)}"
            )
        if not medusa and self.preset not in TRAINABLE:
            raise CompileError(f"unknown preset {self.preset!r}; there are: {', '.join(TRAINABLE)}")
        for option in ("enable", "freeze"):
            object.__setattr__(self, option, check.names(option, getattr(self, option)))
        for option, values in (
            ("format", FORMATS),
            ("recipe", RECIPES),
            ("schedule", SCHEDULES),
            ("device", ("auto", "cpu", "cuda")),
        ):
            check.choice(option, getattr(self, option), values)
        if self.objective is not None:
            check.choice("objective", self.objective, OBJECTIVES)
        check.text("separator", self.separator)
        check.flag("chat", self.chat)
        check.flag("match_scale", self.match_scale)
        check.flag("bf16", self.bf16)
        for option, least in _WHOLE.items():
            value = getattr(self, option)
            if value is not None:
                object.__setattr__(self, option, check.whole(option, value, least))
        for option, (low, high) in _SHARES.items():
            value = getattr(self, option)
            if value is None:
                continue
            value = check.number(option, value)
            if not low <= value <= high:
                raise CompileError(f"{option} is {value:g}; it can be {low:g} to {high:g}")
            object.__setattr__(self, option, value)
        if self.resent_ramp and not self.resent:
            raise CompileError("resent_ramp is for rows that are resent; set resent, too")

    @property
    def merges(self) -> bool:
        """Whether the preset is one of MERGE's."""
        return self.preset.startswith("merge")

    def complete(self) -> AdaptConfig:
        """The same options, with a value for each that depends on others."""
        recipe = RECIPE[self.recipe] if self.merges else {"noise": 0.0, "dropout": 0.0}
        data = self.merges or self.medusa
        rate = 1e-3 if self.medusa else 8e-5
        part = max(1, self.steps // 10)
        return replace(
            self,
            objective=self.objective or ("data" if data else "teacher"),
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            noise=recipe["noise"] if self.noise is None else self.noise,
            dropout=recipe["dropout"] if self.dropout is None else self.dropout,
            evaluate_every=self.evaluate_every or part,
            save_every=self.save_every or part,
            log_every=self.log_every or max(1, self.steps // 50),
        )

    @property
    def evaluate_training(self) -> bool:
        """Whether validation runs with noise and dropout, as MERGE's scripts do."""
        return self.merges and bool(RECIPE[self.recipe]["evaluate_training"])

    def settings(self) -> dict[str, Any]:
        """The options as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "enable": list(self.enable), "freeze": list(self.freeze)}


_WHOLE = {
    "length": 4,
    "steps": 1,
    "batch": 1,
    "accumulate": 1,
    "warmup": 0,
    "resent": 0,
    "seed": 0,
    "evaluate_every": 1,
    "save_every": 1,
    "log_every": 1,
    "samples": 1,
    "answer": 1,
}
"""The smallest value of each whole number."""

_SHARES: dict[str, tuple[float, float]] = {
    "validation": (0.0, 0.5),
    "learning_rate": (0.0, 1.0),
    "weight_decay": (0.0, 1.0),
    "clip": (0.0, 1e6),
    "cosine": (0.0, 1.0),
    "noise": (0.0, 100.0),
    "dropout": (0.0, 0.99),
    "resent_ramp": (0.0, 1.0),
    "layer_steps": (0.0, 1.0),
    "layer_weight": (0.0, 1e6),
    "temperature": (0.01, 100.0),
}
"""The smallest and the largest value of each other number."""
