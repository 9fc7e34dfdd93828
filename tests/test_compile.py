"""From a random decoder to bundles and back: the whole compiler, without the parties."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergec import CompileConfig, Program, compile_decoder
from mergec.compiler.answer import Answer
from mergec.runtime.program.bundle import TENSORS, role_path
from mergec.runtime.program.encoding import dtype_name
from mergec.runtime.roles.inprocess import InProcessSession

PROMPT, COUNT = [5, 17, 3, 88, 41], 6


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def saved(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    said: list[str] = []
    config = CompileConfig(max_length=64, logit_noise=0)  # The best tokens are close.
    program = compile_decoder(model, config=config, progress=said.append)
    assert said, "reports its progress"
    return program.save(tmp_path_factory.mktemp("compile") / "bundles")


def test_plaintext_of_the_bundles_is_the_models(model: torch.nn.Module, saved: Path) -> None:
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(COUNT):
            token = model(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
    expected = ids[0, len(PROMPT) :].tolist()
    plain = Program.load(saved).plaintext(Answer("", PROMPT, expected))
    assert plain.tokens == expected


@pytest.mark.parametrize("role", ["client", "dealer"])
def test_neither_client_nor_dealer_gets_a_weight(
    model: torch.nn.Module, saved: Path, role: str
) -> None:
    held = load_file(role_path(saved, role) / TENSORS)
    weights = dict(model.named_parameters())
    assert not set(held) & set(weights)
    for tensor in held.values():
        for weight in weights.values():
            assert tensor.shape != weight.shape or not torch.equal(tensor, weight)
    for file in role_path(saved, role).rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        for weight in weights.values():
            assert weight.detach().numpy().tobytes()[:64] not in content or _constant(weight)


def _constant(weight: torch.Tensor) -> bool:
    """A norm's gain of all ones contains no information."""
    return bool((weight == weight.flatten()[0]).all())


def test_the_manifest_tells_of_the_model(saved: Path) -> None:
    manifest = Program.load(saved, roles=["client"]).manifest
    assert manifest.model == "LlamaForCausalLM"
    assert (manifest.vocab_size, manifest.max_length) == (97, 64)
    assert manifest.lossy is False
    assert {entry["pass"] for entry in manifest.passes} >= {"fuse_attention", "fuse_rms_norm"}
    outputs = manifest.shapes["outputs"]
    assert len(outputs) == 5, "logits, and key and value of two layers"
    decode = manifest.cost["decode"]
    assert decode["rounds"] > 0
    assert decode["online"] > 0


def test_inspection_finds_the_layers(saved: Path) -> None:
    inspection = Program.load(saved, roles=["client"]).inspect(1, 8)
    layers = [row.key for row in inspection.by_layer]
    assert {"model.layers.0", "model.layers.1", "lm_head"} <= set(layers)
    assert sum(row.rounds for row in inspection.by_op) == inspection.total.rounds


def test_tied_weights_are_stored_once(saved: Path) -> None:
    stored = load_file(role_path(saved, "server") / TENSORS)
    tables = [name for name, tensor in stored.items() if tensor.shape == (97, 32)]
    assert len(tables) == 1
    assert all(dtype_name(t.dtype) == "float32" for t in stored.values() if t.is_floating_point())


def test_a_mask_that_the_client_knows() -> None:
    """A model may leave out a token, which is a secret: a truth value times a shared number."""

    class Skips(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = torch.nn.Embedding(40, 16), torch.nn.Linear(16, 40)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids) * (ids != 0)[..., None])

    model, config = Skips(), CompileConfig(max_length=16, logit_noise=0)
    with InProcessSession(compile_decoder(model, config=config).roles) as session:
        for prompt in ([5, 7], [5, 0]):
            with torch.no_grad():
                wanted = model(torch.tensor([prompt]))[0, -1]
            assert float((session.step(prompt, 0) - wanted).abs().max()) < 1e-3
