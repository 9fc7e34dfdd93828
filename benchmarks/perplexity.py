"""Perplexity of SmolLM2 on a text under MPC arithmetic, compared with plaintext.

The text is the standard library's help topics, in windows that each begin without a past. All three
roles run in one process with the real protocols. `--check N` first runs N tokens in three processes
as well, with the same seeds, and compares all logits bit for bit. Writes docs/perplexity.md.
Usage: python benchmarks/perplexity.py [--tokens N] [--window N] [--check N]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import help_topics
from role import executor_of, peer_of
from safetensors.torch import load_file, save_file
from torch import fx

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.frontend.load import load_model
from mergec.compiler.graph.ir import aten, calls
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.memory import keep_freed_memory, release_freed_memory
from mergec.runtime.core.spec import CLIENT, ROLES
from mergec.runtime.correlations.prg import new_seed
from mergec.runtime.kernels.matmul import set_threads
from mergec.runtime.program.bundle import load_bundle, role_path
from mergec.runtime.roles.inprocess import InProcessSession
from mergec.runtime.session.own_steps import MergecSession
from mergec.runtime.transport.lines import Lines, take

TARGET = Path(__file__).resolve().parent.parent / "docs" / "perplexity.md"

ALLOWED = 1e-3
"""Largest relative difference between the two perplexities."""

CHUNK = 64
"""New tokens per step."""


class KeepAllLogits(Pass):
    """Return logits of all new positions; a program for generation returns only the last one.

    Before:
        %1 = aten.slice.Tensor(%x, 1, -1, end)
        %2 = aten.linear.default(%1, %weight)
    After:
        %1 = aten.linear.default(%x, %weight)
    """

    stage = "canonicalize"

    def run(self, graph_module: fx.GraphModule) -> int:
        (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
        node, sites = output.args[0][0], 0
        while node.op == "call_function" and node.all_input_nodes:
            source = node.args[0]
            if calls(node, aten.slice.Tensor) and node.args[1:3] == (1, -1):
                node.replace_all_uses_with(source)
                sites += 1
            node = source
        return sites


CONFIG = CompileConfig(extra_passes=(KeepAllLogits,), check_passes=False, logit_noise=0.0)
"""Without the check of exact passes: this one gives more logits on purpose. Without the server's
noise, which would be another one in each run."""


@dataclass
class Score:
    """Sums over the tokens predicted so far. Likelihoods are natural logarithms."""

    tokens: int = 0
    plain: float = 0.0
    private: float = 0.0
    worst_logit: float = 0.0
    worst_token: float = 0.0
    same_choice: int = 0

    def add(self, private: torch.Tensor, plain: torch.Tensor, following: torch.Tensor) -> None:
        """Add logits [n, V] in float64, and the tokens [n] that follow."""
        mine, theirs = (
            rows.log_softmax(-1).gather(1, following[:, None])[:, 0] for rows in (private, plain)
        )
        self.tokens += len(following)
        self.private -= float(mine.sum())
        self.plain -= float(theirs.sum())
        self.worst_token = max(self.worst_token, float((mine - theirs).abs().max()))
        self.worst_logit = max(self.worst_logit, float((private - plain).abs().max()))
        self.same_choice += int((private.argmax(-1) == plain.argmax(-1)).sum())

    def perplexity(self, total: float) -> float:
        return float(torch.tensor(total / self.tokens, dtype=torch.float64).exp())

    @property
    def difference(self) -> float:
        """Relative difference of the private perplexity from plaintext's."""
        return self.perplexity(self.private) / self.perplexity(self.plain) - 1


def chunks(tokens: list[int], window: int) -> list[tuple[list[int], int]]:
    """New tokens, and how many tokens of their window come before them."""
    return [
        (tokens[first : min(first + CHUNK, start + window)], first - start)
        for start in range(0, len(tokens), window)
        for first in range(start, min(start + window, len(tokens)), CHUNK)
    ]


def measure(session: InProcessSession, model: Any, tokens: list[int], window: int) -> Score:
    """Score every token that has a token before it in its window."""
    score = Score()
    for index, (new, past) in enumerate(chunks(tokens, window)):
        private = session.rows(new, past)
        first = index // -(-window // CHUNK) * window
        known = torch.tensor(tokens[first : first + past + len(new) + 1])
        known = known[: min(window, len(tokens) - first)]
        with torch.inference_mode():
            plain = model(input_ids=known[None]).logits[0, past : past + len(new)].double()
        following = known[past + 1 : past + len(new) + 1]
        score.add(private[: len(following)], plain[: len(following)], following)
        print(
            f"{score.tokens} tokens: plaintext {score.perplexity(score.plain):.4f}, "
            f"MPC {score.perplexity(score.private):.4f}, {score.difference:+.2e}",
            file=sys.stderr,
            flush=True,
        )
    return score


# ------------------------------------------------------------------ the same in three processes


def same_in_processes(program: Program, tokens: list[int]) -> bool:
    """Whether three processes compute the logits of one process bit for bit, from equal seeds."""
    seeds = new_seed(), new_seed()
    steps = chunks(tokens, len(tokens))
    with InProcessSession(program.roles, seeds=seeds) as session:
        here = torch.cat([session.rows(new, past) for new, past in steps])
    with tempfile.TemporaryDirectory(prefix="mergec-perplexity-") as name:
        folder = Path(name)
        program.save(folder / "program")
        job = {
            "seeds": [seed.hex() for seed in seeds],
            "steps": steps,
        }
        (folder / "job.json").write_text(json.dumps(job))
        command = [sys.executable, __file__, "--folder", name, "--role"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        with Lines() as lines:
            parties = [
                subprocess.Popen(
                    [*command, role, "--lines", *map(str, lines.of(role))],
                    env=environment,
                    pass_fds=lines.of(role),
                )
                for role in ROLES
            ]
        try:
            codes = [party.wait() for party in parties]
        finally:
            for party in parties:
                party.kill()
        if any(codes):
            raise SystemExit("a role failed; see its message above")
        there = load_file(folder / "logits.safetensors")["logits"]
    return torch.equal(here, there)


def play(folder: Path, role: str, descriptors: list[int]) -> None:
    """One role of `same_in_processes`; the client writes its logits."""
    job = json.loads((folder / "job.json").read_text())
    seeds = tuple(bytes.fromhex(seed) for seed in job["seeds"])
    program = load_bundle(role_path(folder / "program", role), role)
    channels = take(role, descriptors)
    running = executor_of(program, channels, seeds=seeds)
    session = MergecSession(running.executor, lambda: channels[peer_of(role)].traffic)
    session.setup()
    running.finish()
    rows = []
    for new, past in job["steps"]:
        rows.append(session.rows(len(new), past, new if role == ROLES[CLIENT] else None))
        running.finish()
    running.leave()
    if role == ROLES[CLIENT]:
        save_file({"logits": torch.cat(rows)}, folder / "logits.safetensors")


def report(score: Score, window: int, checked: int) -> str:
    """The Markdown page."""
    lines = [
        "# Perplexity",
        "",
        "SmolLM2-135M-Instruct, unchanged, preset `exact`, weights held by the server, 16",
        f"fractional bits, on the help topics of Python {platform.python_version()}'s standard",
        f"library in alphabetical order. The text is cut into windows of {window} tokens; each",
        "token but a window's first is predicted from those before it in its window. Plaintext",
        f"is float32. Made by `make perplexity`, which takes {CHUNK} new tokens a step and runs",
        "all three roles in one process, with the real protocols, masks and messages. Logits are",
        "those without the noise that the server adds.",
    ]
    if checked:
        lines += [
            f"The first {checked} tokens also ran in three processes, from the same seeds:",
            "all logits were the same, bit for bit.",
        ]
    plain, private = score.perplexity(score.plain), score.perplexity(score.private)
    lines += [
        "",
        "| | plaintext | MPC |",
        "| --- | ---: | ---: |",
        f"| perplexity on {score.tokens} tokens | {plain:.5f} | {private:.5f} |",
        f"| relative difference | | {100 * score.difference:+.5f} % |",
        f"| worst difference of a token's log-likelihood | | {score.worst_token:.5f} |",
        f"| worst logit error | | {score.worst_logit:.5f} |",
        f"| positions with the same best token | | {score.same_choice} of {score.tokens} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--check", type=int, default=0)
    parser.add_argument("--output", type=Path, default=TARGET)
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_threads(1)
    if options.role:
        play(options.folder, options.role, options.lines)
        return
    model, tokenizer = load_model("smollm2")
    program = compile_decoder(model, tokenizer, CONFIG)
    program.history = None
    tokens = help_topics(tokenizer, options.tokens)
    if options.check and not same_in_processes(program, tokens[: options.check]):
        raise SystemExit("three processes computed other logits than one, from the same seeds")
    release_freed_memory()
    keep_freed_memory()
    with InProcessSession(program.roles) as session:
        score = measure(session, model, tokens, options.window)
    page = report(score, options.window, options.check)
    options.output.write_text(page, encoding="utf-8")
    print(page)
    if abs(score.difference) > ALLOWED:
        raise SystemExit(f"the perplexities differ by more than {ALLOWED:.1%}")


if __name__ == "__main__":
    main()
