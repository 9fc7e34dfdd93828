"""What kind of thing a noun names: a task with short answers, for adapting a larger model.

`What is a beagle?` is the prompt, `A beagle is a kind of dog.` the answer. Nouns and kinds are
those of WordNet 3.0. Every noun and every kind is one token, so that each part of a text stands at
the same place: MERGE's constant attention attends by position alone.
"""

from __future__ import annotations

import json
import platform
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import steps_of
from harness import run
from transformers import AutoTokenizer

from mergec.compiler.adaptation.data import Encoded, Encoder, read_examples
from mergec.compiler.adaptation.losses import IGNORED, collate
from mergec.compiler.driver import compile_source
from mergec.compiler.frontend.load import load_model

_WORDS = """
agreement aircraft alcohol animal argument army artist athlete bag bed beer beverage bird boat
bomb bone book box bread bridge building cake candy car cattle cheese child church city
clothing club coat company container country craft criminal crowd dessert device dish district
doctor document dog door drug duck enemy engineer equipment fabric family film fish flower food
footwear friend fruit furniture game garment gathering gland grain gun hat herb horse house
implement insect institution instrument jewelry joint joke joy knife lamp lawyer leader letter
lie limb list lover machine mammal material meat medicine merchant message metal mineral money
monkey mountain muscle music musician nerve number nut office official organ organization paper
party path person pipe plant poem priest prison program promise publication question region
relative report reptile request river road room rope rule ruler sauce school scientist seat
seed servant sheep shell ship shoe shop sign signal snake soldier song speech spice spider
statement stone story structure student substance symbol table teacher team tissue tool tooth
toy traveler tree truck union vegetable vehicle vein vessel wall weapon whale window wine wire
word worker worm writer writing
"""
KINDS = frozenset(_WORDS.split())
"""Words for kinds of things, by which children answer."""

FILES = frozenset({5, 6, 8, 10, 13, 14, 15, 17, 18, 20})
"""WordNet's lexicographer files of what can be counted, from animals to plants."""

ENDING = "\n"
"""Stands between prompt and answer."""

ANSWER = 9
LENGTH = 16
"""Tokens of an answer with its end, and most tokens of a text: its prompt has 6."""

HELD, SHARE = 64, 10
"""Nouns to measure with, which no training sees; at most one in so many."""

TURNS, REPEATS = 2, 3
"""How often each program's turn comes, and its steps in each turn; the median of a turn counts."""

FROZEN = ("*embed_tokens*", "*gate_proj*", "*up_proj*", "*q_proj*", "*k_proj*")
"""Parameters that the runs leave as they are: seven of ten, so that a step takes less time."""

CURVE = 12
"""Steps at which the page shows losses, or some more."""

SHOWN = 8
"""Prompts whose answers the page shows."""

EXACT = "exact (the teacher)"

PAST = 10
"""Tokens before the step that is measured."""

BATCH, RATE, EVEN = 32, 3e-4, 0.1
"""Of the teacher: texts of a step, the learning rate's peak, the weight of `unevenness`."""


def _synsets(folder: Path) -> dict[str, tuple[int, list[str], list[str]]]:
    """WordNet's meanings of nouns, by number: lexicographer file, words, and wider meanings."""
    file, found = folder / "data.noun", {}
    if not file.is_file():
        raise SystemExit(f"{file} is missing: apt-get install wordnet-base, or --wordnet DIR")
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        number, lexical, _, size, *rest = line.partition(" | ")[0].split()
        count = 2 * int(size, 16)
        pointers = rest[count + 1 :]
        wider = [
            pointers[at + 1] for at in range(0, 4 * int(rest[count]), 4) if pointers[at] == "@"
        ]
        found[number] = (int(lexical), rest[:count:2], wider)
    return found


def _senses(folder: Path, part: str) -> Iterator[tuple[str, list[str]]]:
    """The words of a part of speech, with their meanings, the most frequent first."""
    for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            word, *fields = line.split()
            yield word, fields[-int(fields[1]) :]


def kinds_of(folder: Path, tokenizer: Any) -> dict[str, tuple[str, list[str]]]:
    """Nouns of one token, each with its kind, and with all kinds that are true of it.

    The kind is the nearest wider meaning of the noun's most frequent meaning that has a word of
    `KINDS`. True are all words of all wider meanings of all its meanings. Plurals are left out, and
    words that are adjectives, too.
    """
    synsets = _synsets(folder)
    adjectives = {word for word, _ in _senses(folder, "adj")}

    def single(word: str) -> bool:
        return len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == 1

    def wider(number: str) -> list[str]:
        """All wider meanings, the nearest first."""
        found, queue = [], list(synsets[number][2])
        while queue:
            found.append(queue.pop(0))
            queue += [other for other in synsets[found[-1]][2] if other not in queue]
        return found

    kinds = {word for word in KINDS if single(word)}
    found = {}
    for word, numbers in _senses(folder, "noun"):
        lexical, words, _ = synsets[numbers[0]]
        if lexical not in FILES or word not in words or not word.isalpha() or len(word) < 3:
            continue
        if word in adjectives or (word.endswith("s") and word[-2] not in "su") or not single(word):
            continue
        near = [w for number in wider(numbers[0]) for w in synsets[number][1] if w in kinds]
        near = [name for name in near if name != word]
        if near:
            true = {w for number in numbers for up in wider(number) for w in synsets[up][1]}
            found[word] = (near[0], sorted(true))
    return found


def question(noun: str) -> str:
    """The prompt of a noun."""
    return f"What is {_article(noun)} {noun}?"


def sentence(noun: str, kind: str) -> str:
    """The answer."""
    return f"{_article(noun).capitalize()} {noun} is a kind of {kind}."


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def write_kinds(folder: Path, wordnet: Path, tokenizer: Any) -> dict[str, Any]:
    """Write texts to train on and to measure with, and what is true; return how many there are."""
    found = kinds_of(wordnet, tokenizer)
    nouns = sorted(found)
    random.Random(0).shuffle(nouns)
    cut = min(HELD, len(nouns) // SHARE)
    for name, part in (("validation", nouns[:cut]), ("train", nouns[cut:])):
        lines = [
            json.dumps({"prompt": question(noun), "answer": sentence(noun, found[noun][0])})
            for noun in part
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    truth = {noun: {"kind": found[noun][0], "true": found[noun][1]} for noun in nouns[:cut]}
    (folder / "truth.json").write_text(json.dumps(truth), encoding="utf-8")
    learned = Counter(found[noun][0] for noun in nouns[cut:])
    ((common, _),) = learned.most_common(1)
    return {
        "nouns": len(nouns),
        "trained": len(nouns) - cut,
        "held": cut,
        "kinds": len({kind for kind, _ in found.values()}),
        "common": common,
        "share": sum(value["kind"] == common for value in truth.values()) / cut,
    }


def encoded(tokenizer: Any, file: Path, size: int) -> list[Encoded]:
    """The texts of a file, as `adapt` encodes them."""
    return Encoder(tokenizer, size, LENGTH, ENDING)(read_examples(file))


def unevenness(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """How unlike the lengths of a layer's rows are: the variance of log mean squares.

    rows: of each layer [B, N, E]. `merge_projections` divides all rows by one deviation, so it is
    exact where this is 0. SmolLM2's first row is a hundred times longer than the others.
    """
    sizes = [part.float().square().mean(-1).clamp(min=1e-12).log() for part in rows]
    return torch.stack([size.var() for size in sizes]).mean()


def make_teacher(base: Any, tokenizer: Any, folder: Path, steps: int) -> Path:
    """The model, trained on the answers, in a folder with the losses on the way.

    The loss has `EVEN` times the `unevenness` of the rows that enter the norms before MLPs.
    """
    place = folder / "teacher"
    if (place / "curve.json").is_file():
        return place
    torch.manual_seed(0)
    begin = time.process_time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = base.to(device).train()
    # A fifth of the weights, which a short training of other words need not move.
    model.get_input_embeddings().requires_grad_(False)
    size = model.config.vocab_size
    texts, held = (encoded(tokenizer, folder / f"{n}.jsonl", size) for n in ("train", "validation"))
    rows: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, given: rows.append(given[0])
        )

    def losses_of(part: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        sent = {name: value.to(device) for name, value in collate(part).items()}
        rows.clear()
        labels = sent["labels"][:, 1:]
        learned = labels != IGNORED
        with torch.autocast(device, torch.bfloat16):
            hidden = model.model(sent["input_ids"], use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[learned])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[learned])
        return loss, unevenness(rows)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01, fused=True)
    draw = random.Random(1)
    curve: list[tuple[int, float, float, float]] = []
    learned: list[float] = []
    every = max(1, steps // 8)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, 10 * step / steps, 2 * (1 - step / (steps + 1)))
        loss, apart = losses_of(draw.sample(texts, min(BATCH, len(texts))))
        optimizer.zero_grad()
        (loss + EVEN * apart).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        learned.append(float(loss.detach()))
        if step % every == 0:
            with torch.no_grad():
                measured = [float(value) for value in losses_of(held)]
            curve.append((step, sum(learned) / len(learned), *measured))
            learned = []
            print(f"teacher, step {step} of {steps}: {curve[-1][1:]}", flush=True)
    model.cpu().eval().save_pretrained(place)
    tokenizer.save_pretrained(place)
    seconds = time.process_time() - begin
    told = {"curve": curve, "seconds": seconds, "steps": steps, "batch": BATCH}
    (place / "curve.json").write_text(json.dumps(told))
    return place


@dataclass(frozen=True)
class Judged:
    """Shares of answers: with the very sentence, with its form, with a kind that is true."""

    exact: float
    formed: float
    true: float


def judged(nouns: Sequence[str], answers: Sequence[str], truth: Mapping[str, Any]) -> Judged:
    """How good answers are. Formed: that of `sentence`, with any one word for the kind."""
    exact = formed = true = 0
    for noun, answer in zip(nouns, answers, strict=True):
        said = re.fullmatch(re.escape(sentence(noun, "")[:-1]) + r"(\w+)\.", answer.strip())
        formed += said is not None
        kind = said[1] if said else ""
        exact += kind == truth[noun]["kind"]
        true += kind in truth[noun]["true"] or kind == truth[noun]["kind"]
    return Judged(*(count / len(answers) for count in (exact, formed, true)))


def seconds_of(folders: Mapping[str, Path], tokens: Sequence[int]) -> dict[str, float]:
    """What a decode step of each folder's program takes in three processes, the programs in turn.

    tokens: those before the step, and its own. Seconds are with the dealer at work beside it.
    """
    programs = {name: compile_source(at, {"max_length": LENGTH}) for name, at in folders.items()}
    shapes = [(1, len(tokens) - 1)]
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(TURNS):
        for name, program in programs.items():
            steps = steps_of(program, tokens, shapes, REPEATS)
            taken[name] += [step.seconds for step in run(program.roles, steps, "mergec")]
    return {name: median(each) for name, each in taken.items()}


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in a file, or is made now and written there."""
    if not file.is_file():
        file.write_text(json.dumps(make()))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


class Page:
    """The section of docs/adaptation.md, from the reports of all runs."""

    def __init__(self, folder: Path, teacher: Path, found: dict[str, dict[str, Any]]) -> None:
        self.found = found
        self.tokenizer = AutoTokenizer.from_pretrained(teacher)
        self.truth = json.loads((folder / "truth.json").read_text())
        self.nouns = list(self.truth)
        self.rows = {"teacher": next(iter(found.values()))["rows"][0]}
        for place, said in ((1, "untrained"), (2, "trained")):
            self.rows |= {f"{name}, {said}": r["rows"][place] for name, r in found.items()}

    def texts(self, row: Mapping[str, Any]) -> list[str]:
        return [self.tokenizer.decode(a, skip_special_tokens=True) for a in row["answers"]]

    def quality(self) -> list[str]:
        """The table of measures."""
        names = ("kind", "true", "form", "agreement", "perplexity", "BLEU", "ROUGE-L", "chrF++")
        lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        for name, row in self.rows.items():
            texts = self.texts(row)
            right = judged(self.nouns[: len(texts)], texts, self.truth)
            shares = [right.exact, right.true, right.formed, row["agreement"]]
            cells = [f"{100 * share:.0f} %" for share in shares]
            cells += [
                f"{row[key]:,.1f}" if row[key] < 1e4 else f"{row[key]:.1e}" for key in names[4:]
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return lines

    def costs(self, exact: Mapping[str, Any], seconds: Mapping[str, float]) -> list[str]:
        """What a token costs, and whether the program answers as trained."""
        heads = ["rounds", "bytes", *(["seconds"] if seconds else [])]
        heads += ["CPU minutes of training", "same answers"]
        lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
        for name, cost in {EXACT: exact, **{n: r["cost"] for n, r in self.found.items()}}.items():
            # Where hidden states are resent, each token has a part of the last step, too.
            parts = [cost["decode"], *([cost["finish"]] if "finish" in cost else [])]
            cells = [f"{parts[0]['rounds']:,}", f"{sum(part['online'] for part in parts):,}"]
            cells += [f"{seconds[name] / seconds[EXACT]:.2f}"] if seconds else []
            if name in self.found:
                report = self.found[name]
                cells.append(f"{report['seconds'] / 60:.0f}")
                cells.append(f"{report['same answers']} of {len(report['rows'][2]['answers'])}")
            else:
                cells += ["", ""]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return lines

    def curves(self) -> list[str]:
        """The losses while training runs."""
        steps = sorted(
            {
                entry["step"]
                for r in self.found.values()
                for entry in r["history"]
                if "loss" in entry
            }
        )
        shown = steps[:: max(1, len(steps) // CURVE)]
        lines = ["| Steps | " + " | ".join(map(str, shown)) + " |"]
        lines.append("| --- |" + " ---: |" * len(shown))
        for name, report in self.found.items():
            at = {entry["step"]: entry["loss"] for entry in report["history"] if "loss" in entry}
            cells = [f"{at[step]:.2f}" if step in at else "" for step in shown]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return lines

    def answers(self) -> list[str]:
        """Answers to the first prompts."""
        nouns = self.nouns[:SHOWN]
        names = [name for name in self.rows if name == "teacher" or name.endswith(", trained")]
        names += [name for name in self.rows if name.endswith(", untrained")]
        lines = ["| | " + " | ".join(map(question, nouns)) + " |"]
        lines.append("| --- |" + " --- |" * len(nouns))
        given = [sentence(noun, self.truth[noun]["kind"]) for noun in nouns]
        rows = {"WordNet": given, **{name: self.texts(self.rows[name])[:SHOWN] for name in names}}
        for name, texts in rows.items():
            cells = [" ".join(text.split()).replace("|", "\\|") for text in texts]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return lines

    def pages(
        self,
        counts: Mapping[str, Any],
        teacher: Path,
        exact: Mapping[str, Any],
        seconds: Mapping[str, float],
    ) -> str:
        """All of it."""
        told = json.loads((teacher / "curve.json").read_text())
        curve = told["curve"]
        learning = [
            "| Teacher's steps | " + " | ".join(str(step) for step, *_ in curve) + " |",
            "| --- |" + " ---: |" * len(curve),
            *(
                f"| {name} | " + " | ".join(f"{row[place]:.2f}" for row in curve) + " |"
                for place, name in enumerate(
                    ("loss in training", "loss in validation", "unevenness in validation"), 1
                )
            ),
        ]
        first = next(iter(self.found.values()))
        options = [
            f"{name}: {r['settings']['steps']} steps of {r['settings']['batch']} texts, rate "
            f"{r['settings']['learning_rate']:g}, objective {r['settings']['objective']}"
            for name, r in self.found.items()
        ]
        # A paragraph is one line of the page.
        return re.sub(r"(?<!\n)\n(?!\n|$)", " ", _TEMPLATE).format(
            **counts,
            percent=f"{100 * counts['share']:.0f} %",
            teacher_steps=told["steps"],
            teacher_batch=told["batch"],
            minutes=told["seconds"] / 60,
            options="; ".join(options),
            samples=len(first["rows"][0]["answers"]),
            first=SHOWN,
            timing=_TIMING.format(past=PAST, turns=TURNS, repeats=REPEATS) if seconds else "",
            torch=torch.__version__,
            python=platform.python_version(),
            learning="\n".join(learning),
            quality="\n".join(self.quality()),
            curves="\n".join(self.curves()),
            costs="\n".join(self.costs(exact, seconds)),
            answers="\n".join(self.answers()),
        )


_TEMPLATE = """\
## SmolLM2

SmolLM2-135M-Instruct (30 layers of width 576, 49,152 tokens) learns a narrow task with short
answers: `What is a beagle?` and a line break → `A beagle is a kind of dog.` Nouns and kinds are
WordNet 3.0's. A noun's kind is the nearest wider meaning of its most frequent meaning that has one
of some two hundred everyday words; every noun and kind is one token, so each part of a text stands
at the same place. Of {nouns:,} nouns {trained:,} are trained on and {held} others are measured
with. There are {kinds} kinds; who always answers "{common}" is right for {percent} of the held
nouns.

The teacher is the model, trained for {teacher_steps} steps of {teacher_batch} texts in bfloat16
({minutes:.0f} CPU minutes). Its loss has a further term, which MERGE does not have: the variance of
the log mean squares of the rows that enter a layer's norm before the MLP. `merge_projections` makes
this norm one constant for all rows, and SmolLM2's first row is some hundred times longer than the
others.

{learning}

The runs start from the teacher, with `--bf16 --schedule linear --noise 0 --dropout 0`, for ER and
MERGE `--match-scale --resent 2`, for MERGE `--resent-ramp 0.5 --layer-weight 1`. At least seven of
ten weights are frozen: embedding, head, the MLP's first products, and the attention's queries and
keys ({options}; torch {torch}, Python {python}).

Answers are greedy, to the first {samples} held nouns. Kind is the share that is WordNet's sentence,
word for word; true the share that names a kind which WordNet gives for any meaning of the noun,
near or far; form the share that has the sentence's form with any word for the kind. Agreement,
perplexity and the scores are as above.

{quality}

While training runs:

{curves}

Rounds and bytes (both directions) are those of one decode step after 128 tokens, as above.{timing}
The last column says how many
answers of the compiled program, run in the clear, are the student's that were measured.

{costs}

The first {first} held nouns, as they come:

{answers}
"""
"""What stands between the page's marks."""

_TIMING = (
    " Seconds are those of one after {past} tokens in three processes on one machine, all programs "
    "in the same run, {turns} turns of {repeats} steps each; the exact program's are 1."
)


def measure(
    work: Path,
    wordnet: Path,
    steps: int,
    train: Callable[[Path], dict[str, dict[str, Any]]],
    *,
    timed: bool,
) -> str:
    """The section of the page: data, teacher, runs (`train`, from a teacher's folder), costs.

    timed: whether to run the programs, too, for seconds.
    """
    teacher = work / "teacher"
    model, tokenizer = None, None
    if (teacher / "curve.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(teacher)
    else:
        model, tokenizer = load_model("smollm2")
    counts = write_kinds(work, wordnet, tokenizer)
    found = train(make_teacher(model, tokenizer, work, steps))
    folders = {EXACT: teacher, **{name: report["folder"] for name, report in found.items()}}
    exact = kept(work / "exact.json", lambda: dict(compile_source(teacher, {}).manifest.cost))
    tokens = tokenizer(question("cat") + ENDING + sentence("cat", "animal"))["input_ids"][
        : PAST + 1
    ]
    seconds = kept(work / "seconds.json", lambda: seconds_of(folders, tokens)) if timed else {}
    return Page(work, teacher, found).pages(counts, teacher, exact, seconds)
