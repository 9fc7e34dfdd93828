"""Trains a student or heads with transformers' Trainer, and measures them while it runs."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as hf_logging

from mergec.compiler.adaptation.config import AdaptConfig
from mergec.compiler.adaptation.data import Encoded
from mergec.compiler.adaptation.heads import HeadMeasures, TrainedHeads, head_losses
from mergec.compiler.adaptation.losses import IGNORED, Batch, Losses, collate, losses
from mergec.compiler.adaptation.metrics import agreement
from mergec.compiler.adaptation.student import Student
from mergec.compiler.errors import CompileError

Progress = Callable[[str], object]
Numbers = dict[str, float]


class Measures:
    """Measures a student on validation texts, beside the teacher's answers to their prompts.

    texts: all count for the loss; the prompts of the first `config.samples` are answered. stop: the
    tokens that end an answer.
    """

    def __init__(
        self,
        teacher: Student,
        texts: Sequence[Encoded],
        config: AdaptConfig,
        stop: Sequence[int] = (),
    ) -> None:
        self.teacher = teacher
        self.texts = list(texts)
        self.config = config
        self.stop = tuple(stop)
        self.prompts = [text.prompt for text in self.texts[: config.samples]]
        room = teacher.limit or math.inf
        # The first token of an encoder-decoder's answer is given.
        longest = max(map(len, self.prompts)) + teacher.encodes
        self.count = int(max(1, min(config.answer, room - longest)))
        self._wanted: list[list[int]] | None = None

    @property
    def wanted(self) -> list[list[int]]:
        """The teacher's greedy answers."""
        if self._wanted is None:
            self._wanted = self.answers(self.teacher)
        return self._wanted

    def answers(self, student: Student) -> list[list[int]]:
        """A student's greedy answers, each up to its first stop token."""
        found = []
        for begin in range(0, len(self.prompts), self.config.batch):
            part = self.prompts[begin : begin + self.config.batch]
            found += student.generate(part, self.count)
        return [self._cut(answer) for answer in found]

    def _cut(self, answer: list[int]) -> list[int]:
        """What a user gets: what follows a stop token was never learned."""
        ends = (place for place, token in enumerate(answer, 1) if token in self.stop)
        return answer[: next(ends, None)]

    @torch.no_grad()
    def loss(self, student: Student, *, layers: bool = False, disturbed: bool = False) -> Numbers:
        """The mean loss of all texts, and its parts."""
        device = next(student.parameters()).device
        sums: Numbers = {}
        for begin in range(0, len(self.texts), self.config.batch):
            part = self.texts[begin : begin + self.config.batch]
            batch = {name: value.to(device) for name, value in collate(part).items()}
            found = losses(
                student, self.teacher, batch, self.config, layers=layers, disturbed=disturbed
            )
            for name, value in {"loss": found.total, **found.parts}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(part)
        return {name: value / len(self.texts) for name, value in sums.items()}

    @torch.no_grad()
    def cross_entropy(self, student: Student) -> float:
        """The mean cross entropy of a learned token, in nats, without noise and dropout."""
        device = next(student.parameters()).device
        total = count = 0.0
        for begin in range(0, len(self.texts), self.config.batch):
            part = collate(self.texts[begin : begin + self.config.batch])
            batch = {name: value.to(device) for name, value in part.items()}
            labels = batch["labels"][:, 1:]
            logits = student(batch["input_ids"], source=batch.get("source")).logits[:, :-1]
            learned = labels != IGNORED
            total += float(cross_entropy(logits[learned], labels[learned], reduction="sum"))
            count += float(learned.sum())
        return total / count

    def __call__(self, student: Student, *, layers: bool = False) -> Numbers:
        """The validation loss and its parts, and the agreement of answers with the teacher's."""
        training = student.training
        student.eval()
        try:
            found = self.loss(student, layers=layers, disturbed=self.config.evaluate_training)
            return {**found, "agreement": agreement(self.answers(student), self.wanted)}
        finally:
            student.train(training)


_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear"}
"""The Trainer's names; both begin with the warm-up."""


class AdaptTrainer(Trainer):
    """transformers' Trainer with the losses and measures of an adaptation."""

    control: Any

    def __init__(
        self,
        module: nn.Module,
        texts: Sequence[Encoded],
        config: AdaptConfig,
        folder: Path,
        progress: Progress,
    ) -> None:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=config.steps,
            per_device_train_batch_size=config.batch,
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.clip,
            lr_scheduler_type=_SCHEDULES[config.schedule],
            warmup_steps=config.warmup,
            optim="adamw_torch",
            seed=config.seed,
            data_seed=config.seed,
            use_cpu=config.device == "cpu",
            logging_strategy="steps",
            logging_steps=config.log_every,
            eval_strategy="steps",
            eval_steps=config.evaluate_every,
            save_strategy="steps",
            save_steps=config.save_every,
            save_total_limit=1,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=[],
        )
        # Several GPUs would run copies of the student in threads, which tracing per text forbids.
        arguments._n_gpu = min(1, arguments.n_gpu)
        super().__init__(
            module,
            arguments,
            data_collator=collate,
            train_dataset=list(texts),
            # `evaluate` measures by itself; the Trainer only wants to know that it can.
            eval_dataset=list(texts[:1]),
            callbacks=[_Shown(progress, config.steps)],
        )
        self.remove_callback(PrinterCallback)
        self.settings = config
        self.texts = texts
        self._parts: dict[str, list[torch.Tensor]] = {}
        # The loss is a mean over the batch.
        self.model_accepts_loss_kwargs = False

    @abstractmethod
    def losses(self, batch: Batch) -> Losses:
        """The loss of a batch that is trained on."""

    @abstractmethod
    def measured(self) -> Numbers:
        """The validation loss, and other measures."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """An encoder-decoder runs once for each length of source in a batch (`Student.forward`)."""
        lengths = [len(text.source) for text in self.texts]
        if not any(lengths):
            return super()._get_train_sampler(train_dataset)
        count = self.settings.batch * self.settings.accumulate
        return _ByLength(lengths, count, self.settings.seed)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """All of them, as in the paper's scripts."""
        return [name for name, _ in model.named_parameters()]

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch; notes its parts."""
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.settings.bf16):
            found = self.losses(inputs)
        for name, value in found.parts.items():
            self._parts.setdefault(name, []).append(value)
        return (found.total, None) if return_outputs else found.total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss with the parts that it is made of, in the mean since the last time.

        Raises CompileError if it is not finite: no later step would bring the weights back.
        """
        if "loss" in logs:
            parts = {name: float(torch.stack(v).mean()) for name, v in self._parts.items()}
            if not all(map(math.isfinite, parts.values())):
                ramp = ", a longer resent_ramp" if self.settings.resent else ""
                raise CompileError(
                    f"the loss is no longer finite at step {self.state.global_step:,}; train into "
                    f"another folder with a smaller learning_rate{ramp} or a longer warmup"
                )
            logs = {**logs, **parts}
            self._parts = {}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure on the validation texts."""
        found = {f"{metric_key_prefix}_{name}": value for name, value in self.measured().items()}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


class _ByLength(Sampler[int]):
    """Texts in random order, those of a batch of similar length.

    transformers' sampler draws from torch's generator, whose state an interrupted run does not
    bring back; this one draws by seed and epoch.
    """

    def __init__(self, lengths: Sequence[int], count: int, seed: int) -> None:
        self.lengths, self.count, self.seed, self.epoch = list(lengths), count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.count, generator=generator))


class StudentTrainer(AdaptTrainer):
    """Trains a student for a preset."""

    def __init__(
        self,
        student: Student,
        teacher: Student,
        texts: Sequence[Encoded],
        measures: Measures,
        config: AdaptConfig,
        folder: Path,
        progress: Progress,
    ) -> None:
        super().__init__(student, texts, config, folder, progress)
        self.student, self.teacher, self.measures = student, teacher, measures
        teacher.to(self.args.device)

    @property
    def trains_layers(self) -> bool:
        """Whether the current step is one of the first stage of a distillation."""
        config = self.settings
        return config.objective == "teacher" and (
            self.state.global_step < round(config.layer_steps * config.steps)
        )

    @property
    def share(self) -> float | None:
        """How far resent rows move in the current step; None without a ramp."""
        config = self.settings
        if not config.resent_ramp:
            return None
        return min(1.0, (self.state.global_step + 1) / (config.resent_ramp * config.steps))

    def losses(self, batch: Batch) -> Losses:
        """With noise and dropout."""
        return losses(
            self.student,
            self.teacher,
            batch,
            self.settings,
            layers=self.trains_layers,
            disturbed=True,
            share=self.share,
        )

    def measured(self) -> Numbers:
        """Also the agreement of answers with the teacher's."""
        return self.measures(self.student, layers=self.trains_layers)


class HeadTrainer(AdaptTrainer):
    """Trains heads beside a model that stays as it is."""

    def __init__(
        self,
        heads: TrainedHeads,
        texts: Sequence[Encoded],
        measures: HeadMeasures,
        config: AdaptConfig,
        folder: Path,
        progress: Progress,
    ) -> None:
        super().__init__(heads, texts, config, folder, progress)
        self.heads, self.measures = heads, measures
        heads.model.to(self.args.device)

    def losses(self, batch: Batch) -> Losses:
        return head_losses(self.heads, batch)

    def measured(self) -> Numbers:
        return self.measures(self.heads)


class _Shown(TrainerCallback):
    """Reports losses and measures as lines of text."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress = progress
        self._steps = steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = described(logs or {})
        if shown:
            self._progress(f"step {state.global_step:,} of {self._steps:,}: {shown}")


_NOT_SHOWN = ("epoch", "grad_norm", "learning_rate", "total_flos", "train_")


def described(logs: dict[str, float]) -> str:
    """Numbers of a step as text; "" if none are of interest."""
    return ", ".join(
        f"{name.replace('eval_', 'validation ')} {value:.4g}"
        for name, value in logs.items()
        if not name.startswith(_NOT_SHOWN)
    )


def train(trainer: AdaptTrainer, folder: Path) -> list[dict[str, float]]:
    """Train to the end, from the last checkpoint in `folder` if there is one.

    Returns what was logged at each step.
    """
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    with _silent():
        trainer.train(resume_from_checkpoint=last)
    return list(trainer.state.log_history)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
