"""What training makes of lossy presets: a small GPT-2, or T5, on example sentences of WordNet.

SmolLM2 learns another task, from the same files: what kind of thing a noun names (`kinds.py`).

Three words are the prompt, a sentence that holds them is the answer, as in CommonGen. A teacher is
trained on that from nothing, then adapted by `mergec.adapt` to each preset. The sentences are those
of WordNet 3.0's glosses, which Debian has as wordnet-base: `apt-get install wordnet-base`, or
`apt-get download wordnet-base`, `dpkg -x` and --wordnet. Writes what is between the marks of
docs/adaptation.md, those of the family.

Usage: python benchmarks/adaptation.py [--family gpt2|t5|smollm2] [--wordnet DIR]
[--work DIR] [--output FILE] [--vocabulary N] [--sentences N] [--layers N] [--width N]
[--teacher-steps N] [--steps N] [--samples N] [--untimed] [--only NAME …]

What is done stands in --work and is not done again, so an interrupted run continues there. With
larger numbers the same command trains larger models, on a GPU if there is one.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kinds
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import mergec
from mergec import CompileConfig
from mergec.compiler.adaptation.config import RECIPE
from mergec.compiler.adaptation.data import Encoded, Encoder, read_examples
from mergec.compiler.adaptation.losses import collate
from mergec.compiler.adaptation.metrics import distinct
from mergec.compiler.adaptation.scale import match_scale
from mergec.compiler.adaptation.student import Student
from mergec.compiler.driver import compile_source
from mergec.compiler.frontend.adaptation import stands_at

TARGET = Path(__file__).resolve().parent.parent / "docs" / "adaptation.md"

TITLE = "# What training makes of lossy presets"
MARKS = {
    "gpt2": ("<!-- adaptation: begin -->", "<!-- adaptation: end -->"),
    "t5": ("<!-- adaptation of t5: begin -->", "<!-- adaptation of t5: end -->"),
    "smollm2": ("<!-- adaptation of smollm2: begin -->", "<!-- adaptation of smollm2: end -->"),
}
"""What stands around the tables of each family."""

CONCEPTS = 3
"""Words of a prompt."""

WORDS = (4, 10)
"""Fewest and most words of a sentence."""

HELD = 400
"""Most sentences to measure with."""

SEPARATOR, STOP = " :", "."
START = 1
"""What answers of a T5 begin with: the separator's number, as a T5 needs none."""

LENGTH = CONCEPTS + 1 + WORDS[1] + 1
"""Most tokens of a text: the prompt, the separator, the sentence, and its end."""

HEAD = 32
"""Width of an attention head."""

GPT2_RMS = 0.14
"""Root mean square of GPT-2's embedding, for which the recipes' noise is meant."""

BATCH, TEACHER_BATCH = 16, 32
RATE, TEACHER_RATE = 8e-4, 2e-3
SHOWN = 4
"""Prompts whose answers the page shows."""


@dataclass(frozen=True)
class Row:
    """A run: a preset and options of its training.

    recipe: of noise and dropout of embeddings; without one, there is neither. from_teacher: train
    on the teacher's answers in place of the sentences. changes: other options of AdaptConfig.
    """

    preset: str
    recipe: str | None = None
    from_teacher: bool = False
    changes: tuple[tuple[str, Any], ...] = ()


MATCHED, RESENT = ("match_scale", True), ("resent", 2)
LONGER = (("steps", 2_400), ("evaluate_every", 800), ("save_every", 400))

RUNS = {
    "ER, as described": Row("merge-er", "paper"),
    "MERGE, as described": Row("merge", "paper"),
    "MERGE, as run": Row("merge", "as-run"),
    "MM": Row("merge-mm"),
    "2Quad": Row("mpcformer-2quad"),
    "2ReLU": Row("mpcformer-2relu"),
    "THE-X": Row("thex"),
    "ER, no noise": Row("merge-er"),
    "ER, no noise, no cosine": Row("merge-er", changes=(("cosine", 0.0),)),
    "ER, matched": Row("merge-er", changes=(MATCHED,)),
    "ER, matched, resent": Row("merge-er", changes=(MATCHED, RESENT)),
    "ER, resent, teacher's answers": Row("merge-er", None, True, (RESENT,)),
    "ER, matched, resent, teacher's answers": Row("merge-er", None, True, (MATCHED, RESENT)),
    "MERGE, matched, resent, teacher's answers": Row("merge", None, True, (MATCHED, RESENT)),
    "ER, matched, resent, teacher's answers, 2,400 steps": Row(
        "merge-er", None, True, (MATCHED, RESENT, *LONGER)
    ),
}
"""The runs, by name."""

OF_T5 = {
    **{
        name: RUNS[name]
        for name in ("ER, as described", "ER, matched, resent", "MM", "MERGE, as described")
    },
    "MERGE, matched, resent": Row("merge", changes=(MATCHED, RESENT)),
    **{name: RUNS[name] for name in ("2Quad", "2ReLU")},
}
"""Those of a T5."""

_TEACHER = ("objective", "teacher")
_LONG = (("layer_steps", 0.6), ("learning_rate", 1e-4), ("steps", 150), ("warmup", 10))
_SCALED = (MATCHED, RESENT, ("freeze", (*kinds.FROZEN, "lm_head*")))
_RAMPED = (
    *(("resent_ramp", 0.5), ("layer_weight", 1.0)),
    *(("learning_rate", 2e-4), ("steps", 120), ("warmup", 10)),
)
OF_SMOLLM2 = {
    "MM": Row("merge-mm", changes=(_TEACHER, *_LONG)),
    "ER, matched, resent": Row("merge-er", changes=(*_SCALED, ("steps", 24), ("warmup", 3))),
    "MERGE, matched, resent": Row("merge", changes=(*_SCALED, *_RAMPED)),
}
"""Those of SmolLM2, on another task (`kinds.py`)."""

_SMALL = {"teacher_steps": 2_400, "steps": 800, "samples": 100}
SIZES = {
    "gpt2": _SMALL,
    "t5": _SMALL,
    "smollm2": {"teacher_steps": 48, "samples": 16},
}
"""Steps of the teacher and of each run, and prompts to answer, unless others are asked for.

Runs of SmolLM2 have steps of their own.
"""

OF_FAMILY = {"gpt2": RUNS, "t5": OF_T5, "smollm2": OF_SMOLLM2}

UNTRAINED = {
    "ER, as described": "ER",
    "ER, matched": "ER, matched",
    "MM": "MM",
    "MERGE, as described": "MERGE",
    "2Quad": "2Quad",
    "2ReLU": "2ReLU",
    "THE-X": "THE-X",
}
"""Runs whose measures from before the training are a row, too: one for each preset."""


def sentences(folder: Path) -> Iterator[str]:
    """The example sentences in WordNet's data files: quoted, in lower case, words alone."""
    for name in ("noun", "verb", "adj", "adv"):
        file = folder / f"data.{name}"
        if not file.is_file():
            raise SystemExit(f"{file} is missing: apt-get install wordnet-base, or --wordnet DIR")
        for line in file.read_text(encoding="utf-8").splitlines():
            gloss = "" if line.startswith(" ") else line.partition(" | ")[2]
            for quoted in re.findall(r'"([^"]+)"', gloss):
                words = quoted.lower().strip(" .!?;,").split()
                if WORDS[0] <= len(words) <= WORDS[1] and re.fullmatch(r"[a-z' ]+", quoted.lower()):
                    yield " ".join(words)


def write_data(folder: Path, wordnet: Path, vocabulary: int, most: int) -> dict[str, Any]:
    """Write what to train on, what to measure with, and the words; return what there is of each.

    A sentence counts if all of its words are among the most frequent ones. It is trained on with
    up to three sets of concepts out of its five rarest words, and measured with the three rarest.
    Of the other sentences, the three rarest of the frequent words are more prompts for the teacher.
    """
    found = sorted(set(sentences(wordnet)))
    counts = Counter(word for sentence in found for word in sentence.split())
    order = sorted(counts, key=lambda word: (-counts[word], word))
    words = [word for word in order if word not in (SEPARATOR.strip(), STOP)][:vocabulary]
    known = set(words)
    rank = {word: place for place, word in enumerate(words)}
    kept = [s for s in found if known.issuperset(s.split()) and len(set(s.split())) > CONCEPTS]
    others = [known.intersection(s.split()) for s in found if not known.issuperset(s.split())]
    prompts = {
        " ".join(sorted(sorted(some, key=lambda word: -rank[word])[:CONCEPTS]))
        for some in others
        if len(some) > CONCEPTS
    }
    prompts = set(sorted(prompts)[:most])
    (folder / "prompts.txt").write_text("\n".join(sorted(prompts)), encoding="utf-8")
    draw = random.Random(0)
    draw.shuffle(kept)
    kept = kept[:most]
    cut = min(HELD, len(kept) // 10)
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for place, sentence in enumerate(kept):
        rarest = sorted(set(sentence.split()), key=lambda word: -rank[word])[:5]
        first, *further = itertools.combinations(rarest, CONCEPTS)
        sets = [first]
        if place >= cut:
            sets += draw.sample(further, min(2, len(further)))
        part = lines["validation" if place < cut else "train"]
        part += [{"concepts": sorted(chosen), "target": sentence} for chosen in sets]
    for name, records in lines.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "words.txt").write_text("\n".join(words), encoding="utf-8")
    return {
        "sentences": len(found),
        "words": len(words),
        "kept": len(kept),
        "trained": len(kept) - cut,
        "texts": len(lines["train"]),
        "prompts": len(prompts),
        "held": len(lines["validation"]),
    }


def make_tokenizer(folder: Path) -> Any:
    """A token for each word, the separator and the end."""
    words = (folder / "words.txt").read_text(encoding="utf-8").split("\n")
    numbers = {word: number for number, word in enumerate([STOP, SEPARATOR.strip(), *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=STOP))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=STOP, clean_up_tokenization_spaces=False
    )


def encoded(tokenizer: Any, file: Path, family: str = "gpt2") -> list[Encoded]:
    """The texts of a file, as `adapt` encodes them."""
    begin = START if family == "t5" else None
    encoder = Encoder(tokenizer, len(tokenizer), LENGTH, SEPARATOR, begin=begin)
    return encoder(read_examples(file))


def learned_prompts(folder: Path, tokenizer: Any, family: str = "gpt2") -> set[tuple[int, ...]]:
    """The prompts of the sentences to train on, and those of other sentences."""
    learned = {text.prompt for text in encoded(tokenizer, folder / "train.jsonl", family)}
    if family == "t5":
        return learned
    others = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    return learned | {tuple(tokenizer(other + SEPARATOR)["input_ids"]) for other in others}


def new_model(tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """An untrained model of the family that was asked for."""
    heads = max(1, arguments.width // HEAD)
    if arguments.family == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=arguments.width,
                d_kv=HEAD,
                d_ff=4 * arguments.width,
                num_layers=arguments.layers,
                num_decoder_layers=arguments.layers,
                num_heads=heads,
                decoder_start_token_id=START,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=START,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=LENGTH,
            n_embd=arguments.width,
            n_layer=arguments.layers,
            n_head=heads,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def load_teacher(teacher: Path) -> Any:
    """The teacher in a folder, of either family."""
    loads_pairs = json.loads((teacher / "config.json").read_text())["model_type"] == "t5"
    loader = AutoModelForSeq2SeqLM if loads_pairs else AutoModelForCausalLM
    return loader.from_pretrained(teacher).eval()


def make_teacher(folder: Path, arguments: argparse.Namespace) -> Path:
    """A model trained on the answers, in a folder, with the losses on the way."""
    place = folder / "teacher"
    if (place / "curve.json").is_file():
        return place
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(tokenizer, arguments).to(device)
    texts = encoded(tokenizer, folder / "train.jsonl", arguments.family)
    held = encoded(tokenizer, folder / "validation.jsonl", arguments.family)

    def loss_of(part: Sequence[Encoded]) -> torch.Tensor:
        batch = {name: value.to(device) for name, value in collate(part).items()}
        ids, labels = batch["input_ids"], batch["labels"]
        if "source" in batch:
            # All sources have as many words, so none is padded.
            ids, labels = ids[:, :-1], labels[:, 1:].contiguous()
            loss: torch.Tensor = model(batch["source"], decoder_input_ids=ids, labels=labels).loss
        else:
            loss = model(ids, labels=labels).loss
        return loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=TEACHER_RATE, weight_decay=0.1)
    steps, draw = arguments.teacher_steps, random.Random(1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TEACHER_RATE, steps)
    curve: list[tuple[int, float, float]] = []
    learned: list[float] = []
    every = max(1, steps // 8)
    for step in range(1, steps + 1):
        loss = loss_of(draw.sample(texts, min(TEACHER_BATCH, len(texts))))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        learned.append(float(loss.detach()))
        if step % every == 0:
            model.eval()
            with torch.no_grad():
                curve.append((step, sum(learned) / len(learned), float(loss_of(held))))
            model.train()
            learned = []
            print(f"teacher, step {step} of {steps}: {curve[-1][1:]}", flush=True)
    model.cpu().eval().save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "curve.json").write_text(json.dumps(curve))
    return place


@torch.no_grad()
def write_answers(folder: Path, teacher: Path) -> Path:
    """A file of the teacher's greedy answers, to prompts that it was trained on and to others."""
    file = folder / "answers.jsonl"
    if file.is_file():
        return file
    model, tokenizer = load_teacher(teacher), make_tokenizer(folder)
    prompts = sorted(learned_prompts(folder, tokenizer))
    lines = []
    for begin in range(0, len(prompts), 256):
        ids = torch.tensor(prompts[begin : begin + 256])
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_length=LENGTH,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        for prompt, answer in zip(ids.tolist(), found[:, ids.shape[1] :].tolist(), strict=True):
            stop = tokenizer.eos_token_id
            answer = answer[: answer.index(stop)] if stop in answer else answer
            if answer:
                lines.append(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file


def rms(teacher: Path) -> float:
    """The root mean square of the teacher's embedding."""
    weight: torch.Tensor = load_teacher(teacher).get_input_embeddings().weight
    return float(weight.detach().square().mean().sqrt())


def factor_of(folder: Path, teacher: Path, family: str) -> float:
    """What `match_scale` multiplies hidden states by, on the sentences to measure with."""
    model = load_teacher(teacher)
    texts = encoded(make_tokenizer(folder), folder / "validation.jsonl", family)
    student = Student(copy.deepcopy(model), CompileConfig(), [[0]])
    return match_scale(model, student, [text.sample for text in texts])


def options_of(row: Row, arguments: argparse.Namespace, teacher: Path) -> mergec.AdaptConfig:
    """The options of a run. The recipe's noise is scaled to this embedding."""
    recipe = RECIPE[row.recipe] if row.recipe else {"noise": 0.0, "dropout": 0.0}
    options: dict[str, Any] = {
        "preset": row.preset,
        "recipe": row.recipe or "paper",
        "noise": recipe["noise"] * rms(teacher) / GPT2_RMS,
        "dropout": recipe["dropout"],
        "length": LENGTH,
        "steps": arguments.steps,
        "batch": BATCH,
        "learning_rate": RATE,
        "samples": arguments.samples,
        "answer": WORDS[1] + 1,
        "evaluate_every": max(1, arguments.steps // 4),
        "save_every": max(1, arguments.steps // 2),
    }
    if arguments.family == "gpt2":
        options["separator"] = SEPARATOR
    return mergec.AdaptConfig(**{**options, **dict(row.changes)})


def ran(
    name: str, row: Row, folder: Path, teacher: Path, config: mergec.AdaptConfig
) -> dict[str, Any]:
    """The report of a run, from its folder if it is done, and that folder."""
    place = folder / "".join(letter if letter.isalnum() else "-" for letter in name)
    seconds = place / "seconds.txt"
    if not seconds.is_file():
        begin = time.process_time()
        if stands_at(place):
            # Trained, but interrupted before it was compiled.
            shutil.rmtree(place)
        data = folder / "train.jsonl"
        if row.from_teacher:
            data = write_answers(folder, teacher)
        mergec.adapt(
            teacher,
            data,
            place,
            config,
            validation=folder / "validation.jsonl",
            progress=lambda line: print(f"{name}: {line}", flush=True),
        )
        seconds.write_text(f"{time.process_time() - begin:.0f}\n")
    found: dict[str, Any] = json.loads((place / "report.json").read_text())
    return {**found, "seconds": int(seconds.read_text()), "folder": place}


def adapted(
    name: str, row: Row, folder: Path, teacher: Path, config: mergec.AdaptConfig
) -> dict[str, Any]:
    """The report of a run, with the cost of its program."""
    found = ran(name, row, folder, teacher, config)
    # Of this compiler, as the teacher's is, also where the run was done before.
    return {**found, "cost": dict(compile_source(found["folder"], {}).manifest.cost)}


def repeated(answers: Sequence[Sequence[int]]) -> float:
    """The share of tokens that stood before in the same answer, in the mean over answers."""
    shares = [1 - distinct([answer], 1) for answer in answers if answer]
    return sum(shares) / len(shares) if shares else 0.0


def coverage(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """The share of the prompts' concepts that stand in the answers."""
    found = [
        concept in answer
        for prompt, answer in zip(prompts, answers, strict=True)
        for concept in prompt[:CONCEPTS]
    ]
    return sum(found) / len(found)


class Page:
    """The page, from the reports of all runs."""

    def __init__(self, folder: Path, found: dict[str, dict[str, Any]], arguments: Any) -> None:
        self.found, self.arguments = found, arguments
        self.tokenizer = make_tokenizer(folder)
        family = arguments.family
        held = encoded(self.tokenizer, folder / "validation.jsonl", family)
        self.texts = held[: arguments.samples]
        self.prompts = [text.prompt for text in self.texts]
        learned = learned_prompts(folder, self.tokenizer, family)
        self.met = len(learned.intersection(self.prompts))
        first = next(iter(found.values()))["rows"][0]
        self.rows = {"the sentences themselves": self._given(), "teacher": first}
        for name, report in found.items():
            if name in UNTRAINED:
                self.rows[f"{UNTRAINED[name]}, untrained"] = report["rows"][1]
        for name, report in found.items():
            self.rows[f"{name}, trained" if name in UNTRAINED.values() else name] = report["rows"][
                2
            ]

    def _given(self) -> dict[str, Any]:
        answers = [list(text.answer) for text in self.texts]
        return {
            "answers": answers,
            "distinct-1": distinct(answers, 1),
            "distinct-2": distinct(answers, 2),
        }

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def quality(self) -> list[str]:
        """The table of measures."""
        names = ("perplexity", "agreement", "coverage", "repeated", "BLEU", "ROUGE-L", "chrF++")
        names += ("distinct-1", "distinct-2")
        lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        for name, row in self.rows.items():
            answers = row["answers"]
            shown = {
                **row,
                "coverage": coverage(self.prompts, answers),
                "repeated": repeated(answers),
            }
            cells = [_figure(key, shown.get(key)) for key in names]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return lines

    def curves(self) -> list[str]:
        """How many answered tokens are the teacher's, while training runs."""
        at = {
            name: {
                entry["step"]: entry["eval_agreement"]
                for entry in report["history"]
                if "eval_agreement" in entry
            }
            for name, report in self.found.items()
        }
        steps = sorted({step for measured in at.values() for step in measured})
        lines = ["| Steps | " + " | ".join(f"{s:,}" for s in steps) + " | CPU minutes |"]
        lines.append("| --- |" + " ---: |" * (len(steps) + 1))
        for name, measured in at.items():
            cells = [_figure("agreement", measured.get(step)) for step in steps]
            minutes = f"{self.found[name]['seconds'] / 60:.1f}"
            lines.append(f"| {name} | " + " | ".join([*cells, minutes]) + " |")
        return lines

    def costs(self, exact: dict[str, Any]) -> list[str]:
        """What a token costs between the parties, and whether the program answers as trained."""
        lines = ["| | past | rounds | bytes | program's answers that are the student's |"]
        lines.append("| --- |" + " ---: |" * 4)
        reports = [("exact (the teacher)", exact, None)]
        reports += [(name, r["cost"], r["same answers"]) for name, r in self.found.items()]
        for name, cost, same in reports:
            # Where hidden states are resent, each token has a part of the last step, too.
            parts = [cost["decode"], *([cost["finish"]] if "finish" in cost else [])]
            sent = sum(part["online"] for part in parts)
            equal = "" if same is None else f"{same} of {len(self.prompts)}"
            decode = cost["decode"]
            lines.append(
                f"| {name} | {decode['past']} | {decode['rounds']:,} | {sent:,} | {equal} |"
            )
        return lines

    def answers(self) -> list[str]:
        """Answers to the first prompts."""
        asked = [self._text(prompt[:CONCEPTS]) for prompt in self.prompts[:SHOWN]]
        lines = ["| | " + " | ".join(asked) + " |", "| --- |" + " --- |" * len(asked)]
        for name, row in list(self.rows.items())[1:]:
            cells = [self._text(answer) for answer in row["answers"][:SHOWN]]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return lines


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in ("agreement", "coverage", "repeated"):
        return f"{100 * value:.0f} %"
    if name.startswith("distinct"):
        return f"{value:.2f}"
    return f"{value:,.1f}" if value < 1e4 else f"{value:.1e}"


def page(
    work: Path,
    teacher: Path,
    counts: dict[str, Any],
    found: dict[str, dict[str, Any]],
    arguments: argparse.Namespace,
) -> str:
    """What docs/adaptation.md shows of all runs of a family."""
    model = load_teacher(teacher)
    exact = dict(mergec.compile_decoder(model).manifest.cost)
    measured = Page(work, found, arguments)
    curve = json.loads((teacher / "curve.json").read_text())
    learning = [
        "| Teacher's steps | " + " | ".join(f"{step:,}" for step, *_ in curve) + " |",
        "| --- |" + " ---: |" * len(curve),
        "| loss in training | " + " | ".join(f"{loss:.2f}" for _, loss, _ in curve) + " |",
        "| loss in validation | " + " | ".join(f"{loss:.2f}" for *_, loss in curve) + " |",
    ]
    minutes = sum(report["seconds"] for report in found.values()) / 60
    noises = ", ".join(
        f"{name} {RECIPE[recipe]['noise'] * rms(teacher) / GPT2_RMS:.2f} and "
        f"{RECIPE[recipe]['dropout']:g}"
        for name, recipe in (("as described", "paper"), ("as run", "as-run"))
    )
    # A paragraph is one line of the page.
    template = _TEMPLATE if arguments.family == "gpt2" else _TEMPLATE_OF_T5
    return re.sub(r"(?<!\n)\n(?!\n|$)", " ", template).format(
        **counts,
        concepts=CONCEPTS,
        least=WORDS[0],
        most=WORDS[1],
        layers=arguments.layers,
        width=arguments.width,
        weights=model.num_parameters(),
        tokens=model.config.vocab_size,
        teacher_steps=arguments.teacher_steps,
        teacher_batch=TEACHER_BATCH,
        steps=arguments.steps,
        batch=BATCH,
        rate=RATE,
        samples=len(measured.prompts),
        met=measured.met,
        factor=factor_of(work, teacher, arguments.family),
        rms=rms(teacher),
        noises=noises,
        minutes=minutes,
        torch=torch.__version__,
        python=platform.python_version(),
        learning="\n".join(learning),
        quality="\n".join(measured.quality()),
        curves="\n".join(measured.curves()),
        costs="\n".join(measured.costs(exact)),
        answers="\n".join(measured.answers()),
    )


def of_small(work: Path, arguments: argparse.Namespace, runs: dict[str, Row]) -> str:
    """What docs/adaptation.md shows of a model that is trained here from nothing."""
    counts = write_data(work, arguments.wordnet, arguments.vocabulary, arguments.sentences)
    teacher = make_teacher(work, arguments)
    found = {
        name: adapted(name, row, work, teacher, options_of(row, arguments, teacher))
        for name, row in runs.items()
    }
    return page(work, teacher, counts, found, arguments)


def of_smollm2(work: Path, arguments: argparse.Namespace, runs: dict[str, Row]) -> str:
    """The same of SmolLM2, on its task."""

    def train(teacher: Path) -> dict[str, dict[str, Any]]:
        found = {}
        for name, row in runs.items():
            options: dict[str, Any] = {
                "preset": row.preset,
                "separator": kinds.ENDING,
                "length": kinds.LENGTH,
                "batch": kinds.BATCH,
                "learning_rate": kinds.RATE,
                "schedule": "linear",
                "bf16": True,
                "freeze": kinds.FROZEN,
                "noise": 0.0,
                "dropout": 0.0,
                "samples": arguments.samples,
                "answer": kinds.ANSWER,
                "log_every": 2,
                **dict(row.changes),
            }
            if arguments.steps:
                options["steps"] = arguments.steps
            # A checkpoint and a validation take as long as some steps.
            rarely = {"evaluate_every": options["steps"], "save_every": options["steps"]}
            config = mergec.AdaptConfig(**options, **rarely)
            found[name] = adapted(name, row, work, teacher, config)
        return found

    return kinds.measure(
        work, arguments.wordnet, arguments.teacher_steps, train, timed=not arguments.untimed
    )


_TEMPLATE = """\
## The task

Three words are the prompt, a sentence that holds them is the answer, as in CommonGen: `baby began
cry :` → `the baby began to cry`. The sentences are the examples in WordNet 3.0's glosses (Debian's
package wordnet-base): {sentences:,} different ones of {least} to {most} words in lower case.
{kept:,} of them consist of the {words:,} most frequent words and have more than {concepts}
different ones. {trained:,} are trained on, each with up to three sets of concepts out of its five
rarest words ({texts:,} texts). {held:,} others are measured with, each with its three rarest words.
Concepts stand in alphabetical order, and each word is one token.

The teacher is a GPT-2 of {layers} layers of width {width} ({weights:,} weights, {tokens:,} tokens),
trained from nothing for {teacher_steps:,} steps of {teacher_batch} texts. Losses are nats per token
of the answers:

{learning}

Each run starts from the teacher and takes {steps:,} steps of {batch} texts at a learning rate of
{rate:g}. MERGE's noise and dropout of embeddings are for GPT-2, whose embedding has a root mean
square of 0.14; this teacher's has {rms:.3f}, so the noise is scaled: {noises}. All other runs have
neither. The runs took {minutes:.0f} CPU minutes in all (torch {torch}, Python {python}).

## Quality

Perplexity is that of the {held:,} sentences, each token after the right ones before it, also where
the program would resend hidden states; there, look at the rest, which is of greedy answers to the
first {samples} prompts, cut at their ends. {met} of these prompts stand in the training data, too,
with other sentences or answers. Agreement is the share of tokens that are the teacher's; coverage
the share of concepts that stand in the answer; repeated the share of an answer's tokens that stood
in it before. BLEU, ROUGE-L and chrF++ compare with the one sentence that was given.

{quality}

Agreement with the teacher's answers while training runs:

{curves}

*matched* scales hidden states to the size of embeddings before the training, by {factor:.3f} here;
no logit changes. *resent* runs each training step twice more, with the hidden states of the run
before in place of the answer's embeddings. *teacher's answers* trains on the teacher's greedy
answers in place of the sentences: to the same prompts, and to {prompts:,} prompts from sentences
that have other words, too.

## Cost

Rounds and bytes (both directions) of one decode step of the compiled program; where hidden states
are resent, bytes include a token's part of the last step. The last column says how many answers of
the compiled program, run in the clear, are those of the student that was measured. `adapt` raises
an error if another one is more than a tie. Programs of one preset differ a little, because ranges
from calibration decide what is truncated.

{costs}

## Answers

{answers}
"""
"""What stands between the page's marks."""

_TEMPLATE_OF_T5 = """\
## A T5

The task is the same, but the three words are the source, without a separator. The teacher is a T5
of {layers} layers of width {width} on each side ({weights:,} weights, {tokens:,} tokens, ReLU, a
tied head), trained from nothing for {teacher_steps:,} steps of {teacher_batch} texts:

{learning}

Each run takes {steps:,} steps of {batch} texts at a learning rate of {rate:g}. The teacher's
embedding has a root mean square of {rms:.3f}, so the noise is scaled: {noises}. *matched* scales
hidden states by {factor:.3f}. The columns are those above; {met} of the {samples} prompts stand in
the training data, too. The runs took {minutes:.0f} CPU minutes in all (torch {torch}, Python
{python}).

{quality}

Agreement with the teacher's answers while training runs:

{curves}

Rounds and bytes of one decode step, as above:

{costs}
"""
"""The same of a T5, below the page of GPT-2."""


def written(file: Path, measured: str, family: str = "gpt2") -> str:
    """A page with what was measured between the family's marks; what was found is written by hand.

    Raises SystemExit if the page lacks them.
    """
    first, last = MARKS[family]
    text = file.read_text(encoding="utf-8") if file.is_file() else f"{TITLE}\n\n{first}{last}\n"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"{file} lacks the lines {first} and {last}")
    return f"{before}{first}\n\n{measured}\n{last}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=list(OF_FAMILY), default="gpt2")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--output", type=Path, default=TARGET)
    parser.add_argument("--vocabulary", type=int, default=4_000)
    parser.add_argument("--sentences", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--teacher-steps", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--untimed", action="store_true", help="do not run programs for seconds")
    parser.add_argument("--only", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    for name, value in SIZES[arguments.family].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    runs = OF_FAMILY[arguments.family]
    names = list(runs) if arguments.only is None else arguments.only
    if unknown := [name for name in names if name not in runs]:
        parser.error(f"no run of {arguments.family} is {unknown[0]!r}: {', '.join(runs)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        if arguments.family != "gpt2":
            # Runs of all families have the same names.
            work /= arguments.family
        work.mkdir(parents=True, exist_ok=True)
        chosen = {name: runs[name] for name in names}
        measured = (of_smollm2 if arguments.family == "smollm2" else of_small)(
            work, arguments, chosen
        )
        text = written(arguments.output, measured, arguments.family)
        arguments.output.write_text(text, encoding="utf-8")
    print(arguments.output)


if __name__ == "__main__":
    main()
