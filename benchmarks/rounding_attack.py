"""How much of a model's weights a client estimates from the roundings behind its logits.

Asks one prompt of one token again and again, regresses the logits on what the client knows of the
coins of each rounding, and compares the estimate with the true weights: for the default program and
for others. Writes docs/rounding.md. Usage: python benchmarks/rounding_attack.py [--queries N]
[--victims decoder,llama] [--option NAME=VALUE] [--recordings FOLDER] [--output FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from roundings import DROPPED, OPENED, Coins, Evidence, Recording, correlation, record

from mergec import CompileConfig, compile_decoder
from mergec.compiler.config import DEFAULT_NOISE
from mergec.runtime.core.spec import CLIENT, DEALER, ROLES, SERVER
from mergec.runtime.core.values import Shared
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.kernels.matmul import set_threads
from mergec.runtime.ops import reveal
from mergec.runtime.program.bundle import load_bundle, role_path
from tests import decoder

PROMPT = (5,)
FEW = 10
"""Queries that measure how much a large model's logits vary."""

SHUFFLES, EXACT_SHUFFLES = 5, 20

INTRODUCTION = f"""# What roundings tell a client

A semi-honest client asks one prompt of one token again and again, and regresses the logits on what
it knows of the coins of each rounding
([what roundings reveal](protocols.md#questions-to-ask-of-each-opening)). The numbers are the
correlation between its estimate and the true weights, in the model's own basis,
over all entries. `shuffled` is the control: the largest correlation, in magnitude, of {SHUFFLES}
estimates from coins in another order than the logits, with exact rounding of {EXACT_SHUFFLES}.
Which of the rounding's words and bits are taken for the coins is chosen anew in each order, by
what they explain, as it is for the estimate itself. `queries for 0.9` extrapolates from the last
column of queries: the error of a regression falls as the square root of their number.

All queries of a victim are one session, with the real protocols, of which the program records every
value that is opened to the client, every own share whose low bits are dropped, and every message
that goes one way. Each row then
reveals the same logits by the real op, in the row's setting; 16 bits without noise (22, where a
share has more than 48) is what mergec 0.1.0 revealed. `noise` is the standard deviation. The
attacker gets whatever helps it: which rounding belongs to the wanted matrix, and which of its bits
are the coin; the coins of all other roundings that matter, regressed jointly; the steps of coins
that fall the same way in every query; the bits that the opening of the logits drops of its own
share; and the space of all logits, on which it projects them, so that noise outside of it is lost.
It averages nothing before the regression, which would average the coins as well. Made by
`make rounding-attack`.
"""
TARGET = Path(__file__).resolve().parent.parent / "docs" / "rounding.md"


@dataclass(frozen=True)
class Secret:
    """A matrix that the client wants: how far each wire that an instruction rounds moves a logit.

    instruction, kind: the rounding, by the name of the instruction in the public program.
    """

    label: str
    instruction: str
    kind: str
    matrix: np.ndarray


@dataclass(frozen=True)
class Victim:
    """A model with random weights, its programs, and what there is to find out about it.

    space: a matrix [V, W] whose columns span all logits.
    """

    name: str
    what: str
    programs: Mapping[str, Any]
    secrets: tuple[Secret, ...]
    space: np.ndarray


def small_decoder(options: Mapping[str, Any]) -> Victim:
    """The decoder of the tests, a program written by hand, to which only `rounding` applies."""
    programs = {role: decoder.program(role) for role in ROLES}
    for program in programs.values():
        program.manifest = replace(program.manifest, rounding=options.get("rounding", "public"))
    weights = {name: tensor.double().numpy() for name, tensor in decoder.weights().items()}
    head = weights["head.weight"]
    inner = head @ weights["out.weight"] @ weights["v.weight"]
    return Victim(
        "decoder",
        f"the tests' decoder of one layer, width {decoder.WIDTH}, {decoder.VOCAB} tokens, "
        "large weights",
        programs,
        (
            Secret("head", "last.trunc", OPENED, head),
            Secret("first layer (head · out · v)", "norm.trunc", DROPPED, inner),
        ),
        head,
    )


def small_llama(options: Mapping[str, Any]) -> Victim:
    """A Llama of one layer with random weights, compiled with these options."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            initializer_range=0.2,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    program = compile_decoder(model, config=CompileConfig(max_length=64, **options))
    head = program.roles["server"].tensors["lm_head.weight_folded"].double().numpy()
    return Victim(
        "llama",
        "a Llama of one layer, width 32, 256 tokens, compiled",
        program.roles,
        (Secret("head", "model.norm.rms_norm", OPENED, head),),
        head,
    )


VICTIMS = {"decoder": small_decoder, "llama": small_llama}


def recorded(victim: Victim, queries: int, folder: Path | None, tag: str) -> Recording:
    """A recording of this many queries, from `folder` if it holds one that is long enough."""
    file = None if folder is None else folder / f"{victim.name}{tag}.npz"
    if file is not None and file.exists():
        found = Recording.load(file)
        if len(found.logits) >= queries:
            return found.first(queries)
    made = record(victim.programs, PROMPT, queries)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        made.save(file)
    return made


@dataclass(frozen=True)
class Setting:
    """How logits are revealed: to how many fractional bits, with how much noise of the server's."""

    bits: int
    noise: float

    def __str__(self) -> str:
        noise = f"noise 2^{np.log2(self.noise):.0f}" if self.noise else "no noise"
        default = (self.bits, self.noise) == (reveal.REVEALED_FRAC, DEFAULT_NOISE)
        return f"{self.bits} bits, {noise}" + (" (default)" if default else "")


SETTINGS = (
    Setting(22, 0.0),
    Setting(16, 0.0),
    Setting(12, 0.0),
    *(Setting(12, 2.0**-exponent) for exponent in range(12, 6, -1)),
)
"""22 and 16 bits are what 0.1.0 revealed, of shares with more than 48 bits and of others."""

EXACT_SETTINGS = (Setting(22, 0.0), Setting(12, 0.0), Setting(12, DEFAULT_NOISE))
EXACT_QUERIES = 20_000
"""Against exact rounding."""


def revealed(recording: Recording, setting: Setting) -> np.ndarray:
    """The logits as the real op reveals them to the client, [queries, V].

    The client knows the bits of its own share that the op drops, and adds them again: what is left
    is the server's part of the rounding, which is uniform.
    """
    simulation, frac = Simulation(), recording.frac
    words = torch.from_numpy(recording.logits)
    mine = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, words.shape))
    shares = {CLIENT: mine, SERVER: words - mine, DEALER: words.to("meta")}
    with patch.object(reveal, "REVEALED_FRAC", setting.bits):
        results = simulation.run(
            lambda ctx, party: reveal.Reveal.protocol(
                ctx, Shared(shares[party], frac), setting.noise
            )
        )
    seen: np.ndarray = results[CLIENT].value.numpy()
    drop = max(0, frac - setting.bits)
    dropped = (mine.numpy() & ((1 << drop) - 1)) * 2.0**-frac
    return seen + dropped


@dataclass(frozen=True)
class Row:
    """Correlation with a secret in one setting, by the number of queries, and of the controls.

    control: the largest magnitude among shuffles of the most queries. place: how many other groups
    of words explain more of the logits.
    """

    secret: str
    setting: Setting
    found: dict[int, float]
    control: float
    place: int

    @property
    def needed(self) -> float:
        """Queries for a correlation of 0.9, if the estimate's error falls as 1 / sqrt(queries).

        Infinite if the correlation is not above the controls.
        """
        queries, found = max(self.found.items())
        if found <= self.control:
            return float("inf")
        return queries * (1 / found**2 - 1) / (1 / 0.9**2 - 1)


def attack(
    victim: Victim,
    recording: Recording,
    setting: Setting,
    queries: Sequence[int],
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> list[Row]:
    """A row for each secret of the victim.

    The client gets what helps it: the span of all logits, the setting's logits with its own dropped
    bits, the coins of all groups that explain anything, and for which group the wanted matrix is.
    The groups and their shifts are found in the logits before noise; a client could read them off
    the public program.
    """
    logits = revealed(recording, setting)
    ranked = Evidence(recording, recording.logits * 2.0**-recording.frac).find()
    used = [coins for coins in ranked if coins.score > 6]
    generator, rows = np.random.default_rng(seed), []
    for secret in victim.secrets:
        place, target = _of(secret, ranked)
        found: dict[int, float] = {}
        controls: list[float] = []
        for count in sorted(queries):
            evidence = Evidence(recording.first(count), logits[:count], victim.space)
            others = [coins for coins in used if coins is not target]
            while target.group.size + sum(coins.group.size for coins in others) > count / 4:
                others.pop()
            found[count] = correlation(evidence.estimate(target, others), secret.matrix)
        groups = tuple(coins.group for _, coins in _fitting(secret, ranked))
        for _ in range(shuffles):
            mixed = recording.first(max(queries)).shuffled(generator.permutation(max(queries)))
            chosen = Evidence(replace(mixed, groups=groups), mixed.logits * 2.0**-mixed.frac).find()
            made = Evidence(mixed, logits[: max(queries)], victim.space).estimate(
                _of(secret, chosen)[1], others
            )
            controls.append(abs(correlation(made, secret.matrix)))
        rows.append(Row(secret.label, setting, found, max(controls), place))
    return rows


def _of(secret: Secret, ranked: Sequence[Coins]) -> tuple[int, Coins]:
    """The best group of the secret's instruction that has its size, and its place.

    Of its kind, if there is one; exact rounding opens nothing and drops nothing.
    """
    fitting = _fitting(secret, ranked)
    return next((item for item in fitting if item[1].group.kind == secret.kind), fitting[0])


def _fitting(secret: Secret, ranked: Sequence[Coins]) -> list[tuple[int, Coins]]:
    """The groups of the secret's instruction that have its size, with their places."""
    return [
        (place, coins)
        for place, coins in enumerate(ranked)
        if coins.group.instruction == secret.instruction
        and coins.group.size == secret.matrix.shape[1]
    ]


@dataclass(frozen=True)
class Model:
    """What an extrapolation needs of a model that is too slow to attack.

    spread: standard deviation of a logit over equal queries, by roundings alone. size: root mean
    square of an entry of the last layer, [vocabulary, width].
    """

    name: str
    vocabulary: int
    width: int
    size: float
    spread: float
    queries: int

    def needed(self, setting: Setting, *, explained: bool) -> float:
        """Queries for a correlation of 0.9 with the last layer.

        A coin of one unit of 2**-16 moves a logit by an entry of the last layer; its odds have a
        variance of 1/12. Against it stand the noise within the space of the logits, of which
        width / vocabulary is left, and the other roundings. explained: the client has explained
        all of these by their own coins, so that the last rounding alone is left.
        """
        signal = self.size**2 * 2.0**-32 / 12
        within = self.width / self.vocabulary
        against = (setting.noise**2 + 2.0 ** (-2 * setting.bits) / 12) * within
        if not explained:
            against += self.spread**2
        return against / signal / (1 / 0.9**2 - 1)


def measured(bundles: Path, queries: int) -> Model:
    """Ask a compiled model one token a few times, to measure how much its logits vary."""
    programs = {role: load_bundle(role_path(bundles, role), role) for role in ROLES}
    server = programs["server"]
    recording = record(programs, PROMPT, queries)
    by_name = {item.name: item for item in server.instructions}
    (opening,) = [item for item in server.instructions if item.target == "mpc.reveal"]
    head = server.tensors[by_name[opening.args[0].name].args[1].name].double()
    logits = recording.logits * 2.0**-recording.frac
    return Model(
        server.manifest.model,
        head.shape[0],
        head.shape[1],
        float(head.square().mean().sqrt()),
        float(np.sqrt(logits.var(0, ddof=1).mean())),
        queries,
    )


def extrapolation(model: Model) -> list[str]:
    """Markdown about a model that was not attacked."""
    said = (
        f"Not attacked. A last layer of {model.vocabulary:,} x {model.width}, whose entries have a "
        f"root mean square of {model.size:.3f}. Over {model.queries} queries of one token its "
        f"logits varied by {model.spread:.2g} (standard deviation), by roundings alone. The table "
        "assumes that a coin of the last rounding moves a logit by 2^-16 times an entry of the "
        "last layer, that the client regresses on odds, and that the noise is projected on the "
        f"{model.width} dimensions of the logits. In the first column the other roundings stand "
        "against the client. In the second it has explained all of them by regressing on their "
        "coins as well, for which it needs at least as many queries as there are coins."
    )
    lines = [
        f"## {model.name}: extrapolated",
        "",
        said,
        "",
        "| revealed | queries for 0.9 | the same, all other roundings explained |",
        "| --- | ---: | ---: |",
    ]
    for setting in SETTINGS:
        needed = [_rounded(model.needed(setting, explained=known)) for known in (False, True)]
        lines.append(f"| {setting} | {' | '.join(f'{number:,}' for number in needed)} |")
    return [*lines, ""]


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown, one line for each row."""
    counts = list(rows[0].found)
    head = ["revealed", *(f"{count:,} queries" for count in counts), "shuffled", "queries for 0.9"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in rows:
        needed = "no sign" if row.needed == float("inf") else f"{_rounded(row.needed):,}"
        cells = [f"{row.found[count]:.3f}" for count in counts] + [f"{row.control:.3f}", needed]
        lines.append(f"| {row.setting} | {' | '.join(cells)} |")
    return lines


def _rounded(number: float) -> int:
    """To two digits."""
    return int(float(f"{number:.1e}"))


def attacked(
    name: str,
    given: Mapping[str, Any],
    settings: Sequence[Setting],
    queries: int,
    options: argparse.Namespace,
    shuffles: int = SHUFFLES,
) -> tuple[Victim, Recording, list[Row]]:
    """A victim compiled with these options, its queries, and a row for each secret and setting."""
    victim = VICTIMS[name](given)
    tag = "".join(f"-{name}-{value}" for name, value in sorted(given.items()))
    recording = recorded(victim, queries, options.recordings, tag)
    counts = [count for count in (1000, 4000) if count < queries]
    rows = [
        row
        for setting in settings
        for row in attack(victim, recording, setting, [*counts, queries], shuffles)
    ]
    return victim, recording, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=14000)
    parser.add_argument("--victims", default=",".join(VICTIMS))
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the compile, for the Llama",
    )
    parser.add_argument("--recordings", type=Path, help="folder to keep recorded queries in")
    parser.add_argument("--extrapolate", type=Path, help="bundles of a model to extrapolate to")
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args()
    set_threads(1)
    torch.set_num_threads(1)
    given = dict(item.split("=", 1) for item in options.option)
    most = min(options.queries, EXACT_QUERIES) if options.queries < 4000 else EXACT_QUERIES
    lines = [INTRODUCTION]
    for name in options.victims.split(","):
        print(name, flush=True)
        victim, recording, rows = attacked(name, given, SETTINGS, options.queries, options)
        exactly = {**given, "rounding": "exact"}
        _, _, exact = attacked(name, exactly, EXACT_SETTINGS, most, options, EXACT_SHUFFLES)
        spread = recording.logits.std(0).mean() / 2.0**recording.frac
        for secret in victim.secrets:
            chosen = [row for row in rows if row.secret == secret.label]
            explained = "explain most" if not chosen[0].place else "also explain a part"
            lines += [
                f"## {name}: {secret.label}",
                "",
                f"{victim.what[0].upper()}{victim.what[1:]}"
                + (f", with {', '.join(options.option)}" if given else "")
                + f". Before noise and window, a logit varies by {spread:.2g} (standard "
                f"deviation) between equal queries. The roundings at `{secret.instruction}` "
                f"{explained} of that.",
                "",
                *table(chosen),
                "",
                "The same with `rounding=exact`:",
                "",
                *table([row for row in exact if row.secret == secret.label]),
                "",
            ]
    if options.extrapolate is not None:
        lines += extrapolation(measured(options.extrapolate, FEW))
    options.output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
