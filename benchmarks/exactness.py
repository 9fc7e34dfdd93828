"""Greedy tokens and logits of SmolLM2 under MPC compared with plaintext: 10 prompts, 32 tokens.

Once as it is compiled for one machine, and once for a slow network, where other protocols are
chosen. All three roles run in one process, a thread each, with the real protocols. Writes
docs/exactness.md. Usage: python benchmarks/exactness.py [--prompts N] [--tokens N] [--networks N …]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from mergec import CompileConfig, compile_decoder
from mergec.compiler.frontend.load import load_model
from mergec.runtime.core.memory import keep_freed_memory
from mergec.runtime.core.network import NETWORKS
from mergec.runtime.kernels.matmul import set_threads
from mergec.runtime.roles.inprocess import InProcessSession

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in one sentence why the sky is blue.",
    "List three prime numbers greater than 100.",
    "Translate 'good morning' into Spanish and Italian.",
    "What does this print? print(sum(range(5)))",
    "Who wrote Pride and Prejudice?",
    "My account number is 4421 and my name is Ada. Repeat both.",
    "Give me a recipe for pancakes.",
    "Is 17 a prime number? Answer yes or no, and why.",
)
CLOSE_CALL = 0.05
"""If plaintext's two best logits differ by less, either token counts as correct."""

TARGET = Path(__file__).resolve().parent.parent / "docs" / "exactness.md"


@dataclass
class Outcome:
    """Results of one prompt: equal tokens, close calls, wrong tokens, and the worst logit error."""

    prompt: str
    tokens: int
    same: int
    close_calls: int
    wrong: int
    worst_error: float
    text: str


def measure(
    session: InProcessSession, model: torch.nn.Module, tokenizer: Any, prompt: str, count: int
) -> Outcome:
    """Generate greedily under MPC, and run the same sequence in plaintext at every step."""
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    sequence = tokenizer(template)["input_ids"]
    start = len(sequence)
    outcome = Outcome(prompt, 0, 0, 0, 0, 0.0, "")
    feed, past = list(sequence), 0
    for _ in range(count):
        private = session.step(feed, past)
        with torch.inference_mode():
            plain = model(input_ids=torch.tensor([sequence])).logits[0, -1].double()
        outcome.worst_error = max(outcome.worst_error, float((private - plain).abs().max()))
        best = plain.topk(2).values
        token = int(private.argmax())
        outcome.tokens += 1
        if token == int(plain.argmax()):
            outcome.same += 1
        elif float(best[0] - best[1]) < CLOSE_CALL:
            outcome.close_calls += 1
        else:
            outcome.wrong += 1
        past += len(feed)
        feed = [token]
        sequence = [*sequence, token]
    answer = sequence[start:]
    if tokenizer.eos_token_id in answer:
        answer = answer[: answer.index(tokenizer.eos_token_id)]
    outcome.text = tokenizer.decode(answer)
    return outcome


def report(results: dict[str, list[Outcome]], count: int) -> str:
    """The Markdown page: outcomes by the network that the program was compiled for."""
    lines = [
        "# Exactness",
        "",
        "SmolLM2-135M-Instruct, unchanged, 16 fractional bits, greedy. At every step, the model",
        "also runs in plaintext (float32) on the privately generated sequence. Its token is",
        "compared with the private one, and all 49,152 logits with the revealed ones. A close",
        f"call is a step where plaintext's two best logits are less than {CLOSE_CALL} apart. Each",
        f"prompt gets {count} tokens, even after a stop token. Made by `make exactness`.",
    ]
    for network, outcomes in results.items():
        lines += ["", f"## Compiled for `{network}`", "", *_section(outcomes)]
    return "\n".join(lines) + "\n"


def _section(outcomes: list[Outcome]) -> list[str]:
    worst = max(o.worst_error for o in outcomes)
    total, same = sum(o.tokens for o in outcomes), sum(o.same for o in outcomes)
    close, wrong = sum(o.close_calls for o in outcomes), sum(o.wrong for o in outcomes)
    verdict = (
        f"**{same} of {total} tokens equal plaintext's, {close} differ at a close call, {wrong} "
        f"otherwise; worst logit error {worst:.4f}.**"
    )
    lines = [
        verdict,
        "",
        "| prompt | tokens | equal | close calls | wrong | worst logit error | answer |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for o in outcomes:
        text = " ".join(o.text.split()).replace("|", "\\|")
        counts = f"{o.tokens} | {o.same} | {o.close_calls} | {o.wrong} | {o.worst_error:.4f}"
        lines.append(f"| {o.prompt} | {counts} | {text[:70]} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["loopback", "wan"])
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args()
    keep_freed_memory()
    set_threads(1)
    model, tokenizer = load_model("smollm2")
    results: dict[str, list[Outcome]] = {}
    with Progress() as progress:
        task = progress.add_task("prompts", total=len(options.networks) * options.prompts)
        for network in options.networks:
            program = compile_decoder(model, tokenizer, CompileConfig(network=network))
            outcomes = results[network] = []
            with InProcessSession(program.roles) as session:
                for prompt in PROMPTS[: options.prompts]:
                    outcomes.append(measure(session, model, tokenizer, prompt, options.tokens))
                    progress.advance(task)
    page = report(results, options.tokens)
    options.output.write_text(page, encoding="utf-8")
    print(page)
    if any(o.wrong for outcomes in results.values() for o in outcomes):
        raise SystemExit("a token differs where it was no close call")


if __name__ == "__main__":
    main()
