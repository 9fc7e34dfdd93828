"""`mergec adapt`, from top to bottom: load, read, train, save, compile, report."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
import random
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergec.compiler.adaptation.config import AdaptConfig
from mergec.compiler.adaptation.data import Encoded, Encoder, Example, read_examples, split
from mergec.compiler.adaptation.heads import HeadMeasures, TrainedHeads
from mergec.compiler.adaptation.report import Report, text_row, write_report
from mergec.compiler.adaptation.scale import match_scale
from mergec.compiler.adaptation.student import Student
from mergec.compiler.backend.deviation import measure_deviation
from mergec.compiler.config import CompileConfig, Sample, as_pair
from mergec.compiler.driver import compile_decoder
from mergec.compiler.errors import CompileError, InternalError
from mergec.compiler.frontend.adaptation import (
    Adaptation,
    read_adaptation,
    stands_at,
    write_adaptation,
)
from mergec.compiler.frontend.capture import capture
from mergec.compiler.frontend.generation import generation_settings, impossible_settings
from mergec.compiler.frontend.heads import Heads
from mergec.compiler.frontend.load import load_model
from mergec.compiler.program import Program
from mergec.compiler.selection import runs_anyway, select
from mergec.passes.resend_hidden import ResendHidden
from mergec.runtime.core.arguments import Arguments
from mergec.runtime.core.spec import Vis
from mergec.runtime.engine.plain import PlainExecutor
from mergec.runtime.session.drafting import Speculation
from mergec.runtime.session.drafting.medusa import Medusa
from mergec.runtime.session.generation import answer
from mergec.runtime.session.plain import PlainSession
from mergec.runtime.session.sampling import Sampling

Progress = Callable[[str], object]

RUN = "run.json"
"""Settings of a run that is not finished, in its folder."""

CHECKPOINTS = "checkpoints"

_APART = 1e-2
"""How far the program's logits may be from the student's, in standard deviations. Both are float32,
in another order: merged products and long sums."""

_OBSERVED = 32
"""Texts from which constants start."""

_CALIBRATED = 8
"""Validation texts that become calibration prompts of the compiled program."""


def _quiet(_: str) -> None:
    """No progress."""


def adapt(
    model: str | Path | nn.Module,
    data: str | Path,
    output: str | Path,
    config: AdaptConfig | None = None,
    *,
    tokenizer: Any = None,
    validation: str | Path | None = None,
    progress: Progress = _quiet,
) -> Report:
    """Train a model so that a lossy preset works, or heads beside it; save it in a folder.

    `mergec compile FOLDER` compiles the result with the passes that it was trained for, and with
    the trained constants or heads in place; so does `compile_decoder` with
    `CompileConfig(adapted=FOLDER)`. The folder also holds report.md and report.json. It is the
    server's secret, as any model is.

    Args:
        model: a folder in Hugging Face format, a .gguf file, `smollm2`, or a model in memory, which
            is not changed. It is the teacher, too, so it should be good at what `data` holds.
        data: a file of texts, or of prompts with answers, which an encoder-decoder needs.
        output: a new or empty folder; or that of an interrupted run with the same model, data and
            options, which then continues from its last checkpoint.
        config: options; see `AdaptConfig`.
        tokenizer: that of a model in memory. Without one, the data must be token numbers.
        validation: a file to validate with, instead of a share of `data`.
        progress: called with one line of text as each stage begins, and while training runs.

    Returns:
        The report: how good the model was, and the student before and after; or how often heads
        are right.

    Raises:
        CompileError: the model cannot be loaded, captured or compiled, or has nothing to train for
            the preset; heads are asked for a model that is no decoder; a line of the data is not as
            expected, or without a prompt for an encoder-decoder; the output folder holds something
            else; or an option is wrong.

    Example:
        >>> import mergec
        >>> config = mergec.AdaptConfig(preset="merge-mm", steps=2_000)
        >>> mergec.adapt("gpt2", "dialogues.jsonl", "adapted", config)  # doctest: +SKIP
    """
    config = _checked(config, progress).complete()
    check = Arguments(CompileError)
    data, folder = check.path("data", data), check.path("output", output)
    if validation is not None:
        validation = check.path("validation", validation)
    if isinstance(model, (str, Path)) and stands_at(Path(model)):
        former = read_adaptation(model)
        done = "has heads" if former.medusa else f"is adapted, for the preset {former.preset!r}"
        raise CompileError(f"{model} already {done}; give the model from before")
    _check_place(folder)
    examples = read_examples(data, config.format)
    if validation is None:
        learned, held = split(examples, config.validation, config.seed)
    else:
        learned, held = examples, read_examples(validation, config.format)
    progress("loading the model")
    loaded: Any
    if isinstance(model, nn.Module):
        loaded = copy.deepcopy(model).eval()
    else:
        loaded, tokenizer = load_model(model)
    if not hasattr(loaded, "save_pretrained"):
        raise CompileError(
            f"a {type(loaded).__name__} cannot be saved in a folder; give a Hugging Face model"
        )
    encodes = bool(getattr(getattr(loaded, "config", None), "is_encoder_decoder", False))
    if config.medusa and encodes:
        raise CompileError(
            f"{type(loaded).__name__} is an encoder-decoder; heads are for decoders such as GPT-2, "
            "so leave out medusa"
        )
    if encodes and config.separator != AdaptConfig.separator:
        raise CompileError(
            f"a {type(loaded).__name__} reads the prompt as its source, and nothing stands between "
            "that and the answer; leave out separator"
        )
    # 16-bit floats train badly; a program is compiled from float32 in any case.
    if next(loaded.parameters()).dtype != torch.float64:
        loaded = loaded.float()
    progress("capturing the model and rewriting it")
    teacher = Student(copy.deepcopy(loaded), CompileConfig(), [[0]])
    teacher.requires_grad_(False)
    _check_settings(loaded, teacher.vocab_size, progress)
    if teacher.limit is not None and config.length > teacher.limit:
        raise CompileError(
            f"length is {config.length}, but the model takes at most {teacher.limit} tokens; ask "
            f"for {teacher.limit} or fewer"
        )
    encoder = Encoder(
        tokenizer,
        teacher.vocab_size,
        config.length,
        config.separator,
        chat=config.chat,
        file=data,
        begin=teacher.start if encodes else None,
    )
    texts, kept = _encoded(encoder, learned, "train on"), _encoded(encoder, held, "validate with")
    settings = {
        **config.settings(),
        "model": _digest_of(teacher),
        "data": _digest(data),
        "validation_data": None if validation is None else _digest(validation),
    }
    run: _Run
    if config.medusa:
        _check_answers(texts, "train on")
        _check_answers(kept, "validate with")
        heads = TrainedHeads(teacher, config.medusa, config.medusa_layers)
        run = _HeadRun(loaded, tokenizer, heads, config, folder, settings, progress)
    else:
        compiled = CompileConfig(preset=config.preset, enable=config.enable)
        observed = _observed(texts, config.seed)
        if config.match_scale:
            factor = match_scale(loaded, teacher, observed)
            progress(f"hidden states are scaled by {factor:.3g}")
        _freeze(loaded, config.freeze)
        student = Student(loaded, compiled, observed)
        _check_student(student, compiled, config)
        run = _StudentRun(
            loaded, tokenizer, teacher, student, encoder.stop, config, folder, settings, progress
        )
    return run.all(texts, kept)


class _Run(ABC):
    """A run whose arguments have been checked."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: AdaptConfig,
        folder: Path,
        settings: dict[str, Any],
        progress: Progress,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config, self.folder, self.settings = config, folder, settings
        self.progress = progress

    @abstractmethod
    def all(self, texts: Sequence[Encoded], held: Sequence[Encoded]) -> Report:
        """Train, save, compile, and report."""

    def _begin(self, measure: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Note the settings in the folder, or compare those that are there: a run continues then.

        Returns the measures from before the training.
        """
        file = self.folder / RUN
        if not file.is_file():
            rows = measure()
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"settings": self.settings, "before": rows}, indent=2))
            return rows
        try:
            noted = json.loads(file.read_text(encoding="utf-8"))
            former, rows = dict(noted["settings"]), list(noted["before"])
        except (ValueError, KeyError, TypeError) as error:
            raise CompileError(f"{file} is damaged; choose another folder") from error
        for name, value in self.settings.items():
            if former.get(name) != value:
                raise CompileError(
                    f"{self.folder} holds an interrupted run with another {name} "
                    f"({former.get(name)!r}, not {value!r}); continue it as it was, or choose "
                    "another folder"
                )
        self.progress("continuing an interrupted run")
        return rows

    def _save(self, adaptation: Adaptation, heads: Heads | None = None) -> None:
        self.progress(f"saving the model in {self.folder}")
        self.model.save_pretrained(self.folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(self.folder)
        write_adaptation(self.folder, adaptation, heads)

    def _report(self, report: Report) -> None:
        """Write a report of what was trained, which leaves no run to continue."""
        write_report(report)
        (self.folder / RUN).unlink()
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)

    def _program(self) -> Program:
        """Compile what was saved."""
        self.progress("compiling the adapted model")
        asked = CompileConfig(
            adapted=str(self.folder),
            name=self.folder.name,
            ignore_settings=impossible_settings(self.model),
        )
        try:
            return compile_decoder(self.model, self.tokenizer, asked)
        except CompileError as error:
            raise CompileError(
                f"{self.folder} holds the adapted model, but it does not compile: {error}"
            ) from error


class _StudentRun(_Run):
    """Trains a student for a preset."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        teacher: Student,
        student: Student,
        stop: Sequence[int],
        *settings: Any,
    ) -> None:
        super().__init__(model, tokenizer, *settings)
        self.teacher, self.student, self.stop = teacher, student, stop

    def all(self, texts: Sequence[Encoded], held: Sequence[Encoded]) -> Report:
        """Train, save, compile, and report."""
        from mergec.compiler.adaptation.train import Measures, StudentTrainer, train

        measures = Measures(self.teacher, held, self.config, self.stop)
        checkpoints = self.folder / CHECKPOINTS
        trainer = StudentTrainer(
            self.student, self.teacher, texts, measures, self.config, checkpoints, self.progress
        )
        self.student.to(trainer.args.device)
        before = self._begin(lambda: self._rows(measures))
        self.progress(f"training on {len(texts):,} texts, validating with {len(held):,}")
        history = train(trainer, checkpoints)
        self.progress("measuring the adapted model")
        self.student.eval().requires_grad_(False)
        rows = [
            *before,
            text_row(f"{self.config.preset}, adapted", measures, self.student, self.tokenizer),
        ]
        self.student.cpu()
        self.teacher.cpu()
        samples = tuple(text.sample for text in held[:_CALIBRATED])
        self._save(Adaptation(self.config.preset, self._enable, self.student.trained(), samples))
        report = Report(self.folder, self.config, rows, history, len(texts), len(held))
        self._report(report)
        self._compile(report, samples, measures)
        return report

    @property
    def _enable(self) -> tuple[str, ...]:
        compiled = CompileConfig(preset=self.config.preset, enable=self.config.enable)
        needless = runs_anyway(compiled)
        return tuple(name for name in self.config.enable if name not in needless)

    def _rows(self, measures: Any) -> list[dict[str, Any]]:
        """How good the model is, and the student before any training."""
        self.progress("measuring the model, and the preset before training")
        self.student.eval()
        untrained = f"{self.config.preset}, untrained"
        rows = [
            text_row("the model", measures, self.teacher, self.tokenizer),
            text_row(untrained, measures, self.student, self.tokenizer),
        ]
        self.student.train()
        return rows

    def _compile(self, report: Report, samples: Sequence[Sample], measures: Any) -> None:
        """Compile what was saved; note its cost, and how far it is from the teacher."""
        program = self._program()
        self._compare(program, as_pair(samples[0]).source)
        report.same = self._same(program, measures, report.rows[-1]["answers"])
        former = capture(self.teacher.model)
        deviation = measure_deviation(program.roles["server"], former, samples)
        adaptation = read_adaptation(self.folder)
        write_adaptation(
            self.folder,
            Adaptation(
                adaptation.preset,
                adaptation.enable,
                adaptation.constants,
                adaptation.calibration,
                deviation,
            ),
        )
        report.cost = dict(program.manifest.cost)
        report.deviation = deviation
        write_report(report)

    def _compare(self, program: Program, prompt: Sequence[int]) -> None:
        """Raise InternalError if the program does not compute what was trained."""
        ((_, found),) = PlainExecutor(program.roles["server"]).generate(prompt, 1)
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            if self.student.encodes:
                begun = torch.tensor([[self.student.start]])
                wanted = self.student(begun, source=ids).logits[0, -1]
            else:
                wanted = self.student(ids).logits[0, -1]
        apart = float((found - wanted).abs().max() / wanted.std())
        if not apart < _APART:
            raise InternalError(
                f"the program's logits are {apart:.2g} standard deviations from the student's"
            )

    def _same(self, program: Program, measures: Any, answers: Sequence[Sequence[int]]) -> int:
        """How many of the program's answers in the clear are the student's.

        Raises InternalError if another answer is more than a tie that was broken the other way.
        This also compares how both resend hidden states, which the logits of one step do not.
        """
        executor, same = PlainExecutor(program.roles["server"]), 0
        for prompt, measured in zip(measures.prompts, answers, strict=True):
            found = executor.generate(prompt, len(measured), stop=self.stop)
            for wanted, (token, row) in zip(measured, found, strict=True):
                if token == wanted:
                    continue
                apart = float((row[token] - row[wanted]) / row.std())
                if not apart < _APART:
                    raise InternalError(
                        f"the program answers with the token {token}, the student with {wanted}, "
                        f"whose logit is {apart:.2g} standard deviations smaller"
                    )
                break
            else:
                same += 1
        return same


class _HeadRun(_Run):
    """Trains heads beside a model that stays as it is."""

    def __init__(self, model: Any, tokenizer: Any, heads: TrainedHeads, *settings: Any) -> None:
        super().__init__(model, tokenizer, *settings)
        self.heads = heads

    def all(self, texts: Sequence[Encoded], held: Sequence[Encoded]) -> Report:
        """Train, save, compile, and report."""
        from mergec.compiler.adaptation.train import HeadTrainer, train

        measures = HeadMeasures(held, self.config)
        checkpoints = self.folder / CHECKPOINTS
        trainer = HeadTrainer(self.heads, texts, measures, self.config, checkpoints, self.progress)
        self.heads.to(trainer.args.device)
        before = self._begin(lambda: [measures.row("heads, untrained", self.heads)])
        self.progress(f"training on {len(texts):,} texts, validating with {len(held):,}")
        history = train(trainer, checkpoints)
        self.heads.requires_grad_(False)
        trained = measures.row("heads, trained", self.heads)
        self.heads.cpu()
        self.heads.model.cpu()
        found = self.heads.trained()
        prompts = tuple(text.tokens for text in held[:_CALIBRATED])
        adaptation = Adaptation("exact", calibration=prompts, medusa=found.count, base=found.base)
        self._save(adaptation, found)
        rows = [*before, trained]
        report = Report(self.folder, self.config, rows, history, len(texts), len(held))
        self._report(report)
        self._compile(report, held)
        return report

    def _compile(self, report: Report, held: Sequence[Encoded]) -> None:
        """Compile what was saved; note its cost, and how many tokens a step gives."""
        program = self._program()
        executor = PlainExecutor(program.roles["server"])
        self._compare(executor, held[0].tokens)
        self.progress("measuring answers")
        report.rows[-1]["tokens a step"] = self._a_step(executor, held)
        report.cost = dict(program.manifest.cost)
        write_report(report)

    def _compare(self, executor: PlainExecutor, prompt: Sequence[int]) -> None:
        """Raise InternalError if the program's heads do not say what was trained."""
        program, ids = executor.program, torch.tensor([list(prompt)])
        (tokens,) = [spec.name for spec in program.inputs if spec.vis is Vis.CLIENT]
        name = program.outputs[0]
        found = executor.step({tokens: ids, **executor.start()}, [name])[name][0]
        with torch.no_grad():
            hidden = self.heads.model(ids).hidden[0, -1]
            for number in range(1, self.heads.count + 1):
                wanted = self.heads(hidden, number)
                apart = float((found[number - 1] - wanted).abs().max() / wanted.std())
                if not apart < _APART:
                    raise InternalError(
                        f"what head {number} of the program says is {apart:.2g} standard "
                        "deviations from what was trained"
                    )

    def _a_step(self, executor: PlainExecutor, held: Sequence[Encoded]) -> float | None:
        """Tokens of a step after the prompt's, in greedy answers; None without such steps."""
        session, room = PlainSession(executor), executor.program.manifest.max_length
        tokens = steps = 0
        for text in held[: self.config.samples]:
            count = min(self.config.answer, room - len(text.prompt))
            if count < 2:
                continue
            drafts = Speculation(Medusa(), self.heads.count)
            greedy = Sampling(temperature=0.0)
            found = list(
                answer(session, text.prompt, max_tokens=count, sampling=greedy, speculation=drafts)
            )
            tokens += len(found) - 1
            steps += sum(len(token.reports) for token in found) - 1
        return tokens / steps if steps else None


def _checked(config: Any, progress: Any) -> AdaptConfig:
    check = Arguments(CompileError)
    if config is not None:
        check.instance("config", config, AdaptConfig, "make one, as AdaptConfig(preset='merge')")
    check.function("progress", progress)
    config = config or AdaptConfig()
    chosen = select(CompileConfig(preset=config.preset, enable=config.enable))
    if config.match_scale and ResendHidden not in chosen:
        raise CompileError(
            "match_scale is for presets that resend hidden states, merge-er and merge; leave it out"
        )
    return config


def _freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave parameters out of the training whose names match. Raises CompileError for a pattern
    that matches none."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise CompileError(
                f"no parameter of the model matches freeze={pattern!r}; there are, among others: "
                f"{', '.join(list(parameters)[:3])}"
            )
        for name in names:
            parameters[name].requires_grad_(False)


def _check_settings(model: Any, vocab_size: int, progress: Progress) -> None:
    """Raise CompileError for generation settings that no program can be compiled with; say which
    ones have to be left out."""
    impossible = impossible_settings(model)
    generation_settings(model, reveal="logits", ignored=impossible, vocab_size=vocab_size)
    if impossible:
        options = " ".join(f"--ignore-setting {name}" for name in impossible)
        progress(f"no program can honour some generation settings; compile with {options}")


def _check_place(folder: Path) -> None:
    """Raise CompileError if a folder holds something other than an interrupted run."""
    if stands_at(folder):
        raise CompileError(f"{folder} holds an adapted model; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise CompileError(f"{folder} is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RUN).is_file():
        raise CompileError(f"{folder} is not empty; choose a new folder")


def _encoded(encoder: Encoder, examples: Sequence[Example], purpose: str) -> list[Encoded]:
    found = encoder(examples)
    if not found:
        raise CompileError(f"the data holds nothing to {purpose}; its texts have too few tokens")
    return found


def _check_answers(texts: Sequence[Encoded], purpose: str) -> None:
    """Raise CompileError if no text has an answer in which a head looks ahead."""
    if not any(len(text.tokens) - max(text.start, 1) > 1 for text in texts):
        raise CompileError(
            f"the data holds no answer of two tokens or more to {purpose}, so heads have nothing "
            "to guess"
        )


def _observed(texts: Sequence[Encoded], seed: int) -> list[Sample]:
    """A few texts, the longest among them, and the longest source: an attention's table is as long
    as these."""
    some = random.Random(seed).sample(list(texts), min(_OBSERVED, len(texts)))
    longest = [max(texts, key=lambda text: len(text.tokens))]
    if longest[0].source:
        longest.append(max(texts, key=lambda text: len(text.source)))
    return [text.sample for text in (*longest, *some)]


def _check_student(student: Student, compiled: CompileConfig, config: AdaptConfig) -> None:
    """Raise CompileError if no pass changed the model, or the recipe does not fit it."""
    if not student.changed and not student.resends:
        names = ", ".join(kind.name() for kind in select(compiled) if not kind.exact)
        raise CompileError(
            f"the preset {config.preset!r} changes nothing in this model ({names} found no place), "
            "so there is nothing to train"
        )
    if config.noise or config.dropout:
        student.embed(torch.zeros(1, 1, dtype=torch.int64))


def _digest_of(teacher: Student) -> str:
    found = hashlib.sha256()
    for name, value in sorted(teacher.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
