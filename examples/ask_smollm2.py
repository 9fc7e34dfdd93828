"""Compile SmolLM2-135M-Instruct and ask it a question, in three processes on this machine."""

from __future__ import annotations

import sys

from rich.console import Console

from mergec import compile_decoder
from mergec.compiler.frontend.load import load_model


def main() -> None:
    question = " ".join(sys.argv[1:]) or "What is the capital of France?"
    model, tokenizer = load_model("smollm2")
    program = compile_decoder(model, tokenizer)
    console = Console()
    console.print(program.inspect(new=1, past=64).render())
    answer = program.generate_local(question, max_tokens=16, on_text=print_now)
    print()
    console.print(answer.table())
    console.print(program.plaintext(answer).comparison(answer))


def print_now(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    main()
