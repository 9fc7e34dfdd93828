"""Client, server and dealer on three machines, set up from scratch, with an eavesdropper.

    python examples/deploy/three_machines.py                     # a tiny random model: seconds
    python examples/deploy/three_machines.py --model smollm2     # SmolLM2-135M-Instruct: minutes

The machines are network namespaces if this user may create them (root may), and otherwise addresses
of the loopback interface. All traffic between client and server passes through `wiretap.py`. At the
end, its copy is searched for the prompt, the answers, and the weights (`traces.py`). With
`--plaintext` there is no TLS: then only the protocols hide them.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import traces

from mergec.runtime.session.text import Text

HERE = Path(__file__).resolve().parent
MERGEC = (sys.executable, "-m", "mergec")
START = 120.0
ROLES = ("client", "server", "dealer")
CONNECTIONS = ("The first answer", "Preparing", "The chat, weights kept", "The stored answer")
PROMPTS = {"smollm2": "The capital of France is", "tiny": "what is said here?"}


@dataclass(frozen=True)
class Machine:
    """Where a role runs: its address, and the prefix of commands that run there."""

    address: str
    prefix: tuple[str, ...] = ()


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextmanager
def namespaces(latency: float) -> Iterator[dict[str, Machine]]:
    """Three namespaces on a switch in a fourth one, in which the wire can be tapped."""
    made: list[str] = []
    mark = secrets.token_hex(2)
    switch = f"mergec-{mark}-wire"

    def add(name: str) -> None:
        ip("netns", "add", name)
        made.append(name)
        ip("-n", name, "link", "set", "lo", "up")

    try:
        add(switch)
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "addr", "add", "10.77.0.100/24", "dev", "switch")
        ip("-n", switch, "link", "set", "switch", "up")
        machines = {"wire": Machine("10.77.0.100", ("ip", "netns", "exec", switch))}
        for number, role in enumerate(ROLES, 1):
            name, address = f"mergec-{mark}-{role}", f"10.77.0.{number}"
            add(name)
            pair = ("type", "veth", "peer", "name", role, "netns", switch)
            ip("-n", name, "link", "add", "eth0", *pair)
            ip("-n", switch, "link", "set", role, "master", "switch", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            if latency:
                tc = ("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "netem", "delay")
                subprocess.run([*tc, f"{latency}ms"], check=True)
            machines[role] = Machine(address, ("ip", "netns", "exec", name))
        yield machines
    finally:
        for name in made:
            ip("netns", "del", name)


def loopback() -> dict[str, Machine]:
    names = (*ROLES, "wire")
    return {name: Machine(f"127.0.0.{number}") for number, name in enumerate(names, 2)}


def tiny_model(folder: Path) -> Path:
    """A random decoder of characters. Its answers mean nothing, but the protocols are the same."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = string.ascii_letters + string.digits + string.punctuation + " "
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Deployment:
    """Runs commands on the machines, and keeps the logs of the services."""

    def __init__(self, folder: Path, machines: dict[str, Machine]) -> None:
        self._folder, self._machines = folder, machines
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parents[1]),
        }

    def run(self, machine: str, *command: str, said: str = "") -> str:
        """Run `mergec …` on a machine until it ends; returns what it prints."""
        print(f"\n[{machine}]$ mergec {' '.join(command)}", flush=True)
        done = subprocess.run(
            [*self._machines[machine].prefix, *MERGEC, *command],
            input=said,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        print(done.stdout.strip(), flush=True)
        if done.returncode:
            sys.exit(f"`mergec {command[0]}` failed; the logs are in {self._folder}")
        return done.stdout.strip()

    def start(self, machine: str, *command: str, program: tuple[str, ...] = MERGEC) -> str:
        """Start a service and wait until it listens; returns its address."""
        name = "mergec" if program == MERGEC else "wiretap"
        print(f"\n[{machine}]$ {name} {' '.join(command)} &", flush=True)
        log = self._folder / f"{machine}.log"
        with log.open("wb") as out:
            started = self._running[machine] = subprocess.Popen(
                [*self._machines[machine].prefix, *program, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and started.poll() is None:
            for line in log.read_text().splitlines():
                if line.startswith("listening "):
                    return line.split()[1]
                if line.startswith("{") and json.loads(line)["event"] == "listening":
                    return str(json.loads(line)["address"])
            time.sleep(0.05)
        sys.exit(f"the {machine} does not start; see {log}\n{log.read_text()}")

    def stop(self, machine: str) -> None:
        process = self._running.pop(machine)
        process.terminate()
        print(f"\n[{machine}] stopped, exit code {process.wait(START)}", flush=True)

    def close(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()


def play(
    folder: Path,
    machines: dict[str, Machine],
    model: str,
    prompt: str,
    tokens: int,
    *,
    plaintext: bool,
) -> None:
    """Compile, deploy, ask in three ways, and search the captured traffic."""
    source = str(tiny_model(folder / "model")) if model == "tiny" else model
    bundles, certs, wire = (folder / name for name in ("bundles", "certs", "wire"))
    wire.mkdir()
    with ExitStack() as stack:
        made = Deployment(folder, machines)
        stack.callback(made.close)
        made.run("client", "compile", source, "-o", str(bundles))
        made.run("client", "certs", str(certs), "--client", "ann")
        keys = {}
        for role in ("client", "server"):
            keys[role] = ("--store-key", str(folder / f"{role}.key"))
            (folder / f"{role}.key").write_text(secrets.token_hex(32))
        # On real machines each role has only its own folder of these.
        secured = {role: ("--certs", str(certs / role)) for role in ("server", "dealer", "ann")}
        if plaintext:
            secured = dict.fromkeys(secured, ("--plaintext",))

        dealer = made.start(
            "dealer", "deal", str(bundles / "dealer"), *secured["dealer"],
            "--listen", f"{machines['dealer'].address}:0",
        )  # fmt: skip
        server = made.start(
            "server", "serve", str(bundles / "server"), *secured["server"],
            "--listen", f"{machines['server'].address}:0", "--dealer", dealer,
            "--stores", str(folder / "server-stores"), *keys["server"],
        )  # fmt: skip
        tap = (sys.executable, str(HERE / "wiretap.py"))
        server = made.start("wire", f"{machines['wire'].address}:0", server, str(wire), program=tap)

        client = (str(bundles / "client"), *secured["ann"], "--server", server)
        asked = ("--prompt", prompt, "--no-chat", "--max-tokens", str(tokens))
        text = Text.load(bundles / "client" / "tokenizer")
        ids = text.encode(prompt)
        keep = ("--keep", str(folder / "kept"))
        answer = made.run("client", "generate", *client, *keep, "--dealer", dealer, *asked)
        stored = ("--store", str(folder / "client-stores"), *keys["client"])
        made.run(
            "client", "prepare", *client, "--dealer", dealer, *stored,
            "--tokens", str(tokens), "--answer", str(tokens), "--prompt", str(len(ids)),
        )  # fmt: skip
        most = ("--max-tokens", str(tokens))
        chat = ("chat", *client, *keep, "--dealer", dealer, *most)
        turn = made.run("client", *chat, said=f"{prompt}\n\n")
        made.stop("dealer")
        again = made.run("client", "generate", *client, *stored, *asked)
        made.stop("server")

    print(f"\nThe answer without the dealer is {'the same' if answer == again else 'ANOTHER'}.")
    texts = {
        f"{owner}: {what}": trace
        for owner, said in (("prompt", prompt), ("answer", answer), ("answer in the chat", turn))
        for what, trace in traces.text_traces(said, text.encode(said)).items()
    }
    rows = traces.weight_traces(bundles / "server")
    for number, what in enumerate(CONNECTIONS, 1):
        up, down = ((wire / f"{number}.{way}").stat().st_size for way in ("up", "down"))
        print(f"{what}: {up:,} bytes to the server, {down:,} back.")
    files = sorted(wire.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(
        f"On the wire: {size:,} bytes of {len(files) // 2} connections. Looked for {len(texts)} "
        f"forms of prompt and answers, and for {len(rows):,} rows of weights."
    )
    found = [trace for file in files for trace in traces.search(file, texts, rows)]
    print("\n".join(found) or "Nothing of them was there.")
    # Finding the public hash shows that the search would have found the rest.
    program = json.loads((bundles / "client" / "manifest.json").read_text())["program_hash"]
    greeting = {"program": program.encode()}
    named = any(True for file in files for _ in traces.search(file, greeting, set()))
    print(f"The program's public hash was {'' if named else 'not '}there.")
    if found or answer != again or named != plaintext:
        sys.exit("the run did not behave as expected; see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, smollm2, a folder or a .gguf file")
    parser.add_argument("--prompt", help="what to ask")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--latency", type=float, default=0, help="ms each way, by tc netem")
    parser.add_argument("--loopback", action="store_true", help="addresses, not namespaces")
    parser.add_argument("--plaintext", action="store_true", help="no TLS; on loopback only")
    parser.add_argument("--folder", type=Path, help="keep bundles, logs and the capture here")
    asked = parser.parse_args()
    prompt = asked.prompt or PROMPTS.get(asked.model, PROMPTS["smollm2"])
    with ExitStack() as stack:
        machines = loopback()
        said = "addresses of the loopback interface"
        if not (asked.loopback or asked.plaintext):
            try:
                machines = stack.enter_context(namespaces(asked.latency))
                said = "network namespaces"
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"No network namespaces here ({error}).")
        where = ", ".join(f"{name} {machine.address}" for name, machine in machines.items())
        print(f"The machines are {said}: {where}.")
        folder = asked.folder or Path(tempfile.mkdtemp(prefix="mergec-"))
        folder.mkdir(parents=True, exist_ok=True)
        if asked.folder is None:
            stack.callback(shutil.rmtree, folder)
        play(folder, machines, asked.model, prompt, asked.tokens, plaintext=asked.plaintext)


if __name__ == "__main__":
    main()
