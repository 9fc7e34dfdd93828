"""GPT-2's decode step in SPU; peers.py runs this in an environment of its own, without mergec.

`prepare` compiles the step and makes shares of the caches, `run` is one party, `collect` puts the
parties' shares of the logits together. The step is plain jax: matrix products, `tanh`, `exp`,
`max`, `rsqrt`. SPU compiles and runs it with its default options, except that it is told who owns
the private inputs, and that it logs its link's statistics.

Usage: python benchmarks/peer_spu.py JOB.json prepare | collect | RANK
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import spu
from spu import experimental, libspu
from spu.utils import frontend

SERVER, CLIENT = 0, 1
"""Ranks. A third party only helps."""

PRIVATE, SECRET = libspu.Visibility.VIS_PRIVATE, libspu.Visibility.VIS_SECRET

Tree = dict[str, Any]


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return centred * scale * weight + bias


def gelu(x: jax.Array) -> jax.Array:
    """GPT-2's: by tanh."""
    return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))


def softmax(x: jax.Array) -> jax.Array:
    powers = jnp.exp(x - x.max(-1, keepdims=True))
    # One reciprocal for a row: SPU would divide each element.
    return powers * (1 / powers.sum(-1, keepdims=True))


def decode_step(heads: int, past: int, eps: float) -> Callable[..., tuple[jax.Array, Any]]:
    """The step: a one-hot token, the weights and the caches of `past` tokens to logits.

    It also returns the token's keys and values, which the next step's caches would have.
    """

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(1, heads, -1).transpose(1, 0, 2)

    def step(token: jax.Array, weights: Tree, caches: Tree) -> tuple[jax.Array, Any]:
        x = token @ weights["wte"] + weights["wpe"][past : past + 1]
        entries = []
        for block, cache in zip(weights["blocks"], caches["blocks"], strict=True):
            h = layer_norm(x, block["ln_1.weight"], block["ln_1.bias"], eps)
            both = h @ block["attn.c_attn.weight"] + block["attn.c_attn.bias"]
            q, k, v = map(split, jnp.split(both, 3, axis=-1))
            entries.append({"key": k, "value": v})
            keys = jnp.concatenate([cache["key"], k], axis=1)
            values = jnp.concatenate([cache["value"], v], axis=1)
            scores = q @ keys.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
            mixed = (softmax(scores) @ values).transpose(1, 0, 2).reshape(1, -1)
            x = x + mixed @ block["attn.c_proj.weight"] + block["attn.c_proj.bias"]
            h = layer_norm(x, block["ln_2.weight"], block["ln_2.bias"], eps)
            h = gelu(h @ block["mlp.c_fc.weight"] + block["mlp.c_fc.bias"])
            x = x + h @ block["mlp.c_proj.weight"] + block["mlp.c_proj.bias"]
        x = layer_norm(x, weights["ln_f.weight"], weights["ln_f.bias"], eps)
        return (x @ weights["wte"].T)[0], entries

    return step


def sharing(cached: bool) -> Callable[..., list[jax.Array]]:
    """What turns the server's private weights into shares, once in a session.

    cached: mark the matrices as SPU's experimental cached variables. Their masked values are opened
    when they are first used, and kept.
    """

    def share(weights: Tree, zero: jax.Array) -> list[jax.Array]:
        # The sum of a private and a secret value is secret.
        shared = [x + zero for x in leaves(weights)]
        if cached:
            shared = [experimental.make_cached_var(x) if x.ndim == 2 else x for x in shared]
        return shared

    return share


def leaves(tree: Any) -> list[Any]:
    found: list[Any] = jax.tree_util.tree_leaves(tree)
    return found


def all_of(tree: Any, value: Any) -> Any:
    return jax.tree_util.tree_map(lambda _: value, tree)


def names_of(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]


def configuration(job: Mapping[str, Any]) -> libspu.RuntimeConfig:
    """SPU's default options, over 64-bit words."""
    config = libspu.RuntimeConfig(
        protocol=spu.parse_protocol_kind(job["protocol"]), field=libspu.FieldType.FM64
    )
    # Without this an input's owner is ignored, and it is shared before the program begins.
    config.experimental_enable_colocated_optimization = True
    config.enable_pphlo_profile = True
    return config


def compiled(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    inputs: list[str],
    visible: Sequence[Any],
    outputs: str,
) -> bytes:
    executable, _ = frontend.compile(
        frontend.Kind.JAX, function, list(arguments), {}, inputs, leaves(visible),
        lambda found: names_of(outputs, len(found)),
    )  # fmt: skip
    text: bytes = executable.SerializeToString()
    return text


class Job:
    """What all processes of a job read: its options, weights and caches."""

    def __init__(self, path: Path) -> None:
        self.options: dict[str, Any] = json.loads(path.read_text())
        self.folder = path.parent
        self.weights = nested(np.load(self.folder / self.options["weights_file"]))
        self.caches = nested(np.load(self.folder / self.options["caches_file"]))
        self.parties = len(self.options["addresses"])
        self.config = configuration(self.options)
        self.io = spu.Io(self.parties, self.config)

    @property
    def token(self) -> np.ndarray:
        return np.eye(1, len(self.weights["wte"]), self.options["token"], dtype=np.float32)

    @property
    def held(self) -> libspu.Visibility:
        """The visibility of weights during the step."""
        return PRIVATE if self.options["weights"] == "private" else SECRET

    def prepare(self) -> None:
        """Compile, and write each party's shares of what a session would have shared before."""
        options, weights, caches = self.options, self.weights, self.caches
        past = caches["blocks"][0]["key"].shape[1]
        step = decode_step(options["heads"], past, options["eps"])
        inputs = ["token", *names_of("weight", len(leaves(weights)))]
        inputs += names_of("cache", len(leaves(caches)))
        visible = (PRIVATE, all_of(weights, self.held), all_of(caches, SECRET))
        arguments = jax.tree_util.tree_map(shape_of, (self.token, weights, caches))
        (self.folder / "step").write_bytes(compiled(step, arguments, inputs, visible, "out"))
        zero = np.zeros((), np.float32)
        if self.held == SECRET:
            given = jax.tree_util.tree_map(shape_of, (weights, zero))
            names = [*names_of("own", len(leaves(weights))), "zero"]
            vis = (all_of(weights, PRIVATE), SECRET)
            first = compiled(sharing(options["weights"] == "cached"), given, names, vis, "weight")
            (self.folder / "setup").write_bytes(first)
        shares = [self.io.make_shares(x, SECRET) for x in [*leaves(caches), zero]]
        for rank, of_rank in enumerate(zip(*shares, strict=True)):
            (self.folder / f"shares-{rank}").write_bytes(pickle.dumps(of_rank))

    def collect(self) -> None:
        """Write the logits."""
        parts = [(self.folder / f"out-{rank}").read_bytes() for rank in range(self.parties)]
        shares = [pickle.loads(part) for part in parts]  # noqa: S301  (this program wrote them)
        np.save(self.folder / "logits.npy", self.io.reconstruct(shares))

    def run(self, rank: int) -> None:
        """Be one party: share the weights if the job says so, and run the step repeatedly.

        The first run is not counted: it begins oblivious transfers, and opens cached variables.
        """
        party = Party(self, rank)
        shares = (self.folder / f"shares-{rank}").read_bytes()
        *caches, zero = pickle.loads(shares)  # noqa: S301  (this program wrote them)
        party.give("token", self.token, CLIENT)
        values = leaves(self.weights)
        given = names_of("weight" if self.held == PRIVATE else "own", len(values))
        # The runtime has its own copy of each.
        self.weights = {}
        for name in given:
            party.give(name, values.pop(0), SERVER)
        for name, share in zip(names_of("cache", len(caches)), caches, strict=True):
            party.runtime.set_var(name, share)
        setup = 0.0
        if self.held == SECRET:
            party.runtime.set_var("zero", zero)
            setup = party.execute("setup")
            for name in given:
                party.runtime.del_var(name)
        party.execute("step")
        seconds = [party.execute("step") for _ in range(self.options["repeats"])]
        (self.folder / f"out-{rank}").write_bytes(pickle.dumps(party.runtime.get_var("out0")))
        said = {"setup": setup, "seconds": seconds}
        (self.folder / f"seconds-{rank}.json").write_text(json.dumps(said))
        # Whoever leaves early would break the others' links.
        party.link.barrier()


class Party:
    """A party's runtime, connected with the others by TCP."""

    def __init__(self, job: Job, rank: int) -> None:
        self._job, self._rank = job, rank
        description = libspu.link.Desc()
        description.recv_timeout_ms = 1000 * job.options["limit"]
        for index, address in enumerate(job.options["addresses"]):
            description.add_party(f"party{index}", address)
        self.link = libspu.link.create_brpc(description, rank)
        self.runtime = spu.Runtime(self.link, job.config)

    def give(self, name: str, value: np.ndarray, owner: int) -> None:
        """Set a private variable; only its owner uses the value."""
        known = value if self._rank == owner else np.zeros_like(value)
        self.runtime.set_var(name, self._job.io.make_shares(known, SECRET, owner)[self._rank])

    def execute(self, name: str) -> float:
        """Seconds of an executable that all parties begin together."""
        executable = libspu.Executable()
        executable.ParseFromString((self._job.folder / name).read_bytes())
        self.link.barrier()
        began = time.perf_counter()
        self.runtime.run(executable)
        return time.perf_counter() - began


def shape_of(value: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def nested(flat: Mapping[str, np.ndarray]) -> Tree:
    """Arrays named `3/attn.c_attn.weight` as entries of a list `blocks`, others as they are."""
    result: Tree = {"blocks": []}
    for name, value in flat.items():
        number, _, rest = name.partition("/")
        if not rest:
            result[name] = value
            continue
        while len(result["blocks"]) <= int(number):
            result["blocks"].append({})
        result["blocks"][int(number)][rest] = value
    return result


if __name__ == "__main__":
    work, what = Job(Path(sys.argv[1])), sys.argv[2]
    if what == "prepare":
        work.prepare()
    elif what == "collect":
        work.collect()
    else:
        work.run(int(what))
