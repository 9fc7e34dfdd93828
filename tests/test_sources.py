"""A model's files are read whole, or refused by name; nothing in them runs."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import capture
from mergec.compiler.frontend.load import load_model
from tests.families import WIDTH, error, random_decoder, tokens

ROOT = Path(__file__).parents[1]


def small(**changes: Any) -> Any:
    return random_decoder("llama", num_hidden_layers=1, **changes).float()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    small().save_pretrained(place)
    return place


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CompileError) as caught:
        load_model(path)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    for word in words:
        assert word in said


def test_code_in_a_folder_is_not_offered_for_execution(folder: Path, tmp_path: Path) -> None:
    """At a terminal, where the loader would ask and wait for an answer."""
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    change(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C"})
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n")
    code = f"from mergec.compiler.frontend.load import load_model; load_model({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=theirs, capture_output=True, text=True, cwd=ROOT
    )
    os.close(ours)
    os.close(theirs)
    assert "auto_map), which mergec never runs" in done.stderr.splitlines()[-1]
    assert "[y/N]" not in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_known_family_is_loaded_by_its_own_code(folder: Path) -> None:
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "mine.C"})
    assert type(load_model(folder)[0]).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8"])
def test_quantized_weights(folder: Path, method: str) -> None:
    change(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(folder, f"quantized ({method})", "before it was quantized")


def test_a_tensor_that_is_not_used(folder: Path) -> None:
    file = folder / "model.safetensors"
    held = load_file(file) | {"extra.weight": torch.ones(3), "another.weight": torch.ones(3)}
    save_file(held, file, metadata={"format": "pt"})
    refused(folder, "LlamaForCausalLM has no place for: another.weight and 1 more")


def test_a_buffer_that_the_model_computes_itself(folder: Path) -> None:
    file = folder / "model.safetensors"
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(file) | {name: torch.ones(4)}, file, metadata={"format": "pt"})
    load_model(folder)


def test_damaged_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content, words in (
        (whole[: len(whole) // 2], "model.safetensors is cut or damaged"),
        (whole[:50], "model.safetensors is cut or damaged"),
        (b"", "model.safetensors is cut or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    ):
        file.write_bytes(content)
        refused(folder, words)
    file.unlink()
    torch.save(small().state_dict(), folder / "pytorch_model.bin")
    load_model(folder)
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    refused(folder, "pytorch_model.bin is cut or damaged")


def test_a_missing_shard(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[-1].unlink()
    refused(tmp_path, shards[-1].name, "is missing")


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


def test_quantized_modules() -> None:
    model = small()
    dynamic = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    packed, eight = small(), small()
    packed.lm_head = Packed()
    eight.lm_head.weight = nn.Parameter(
        eight.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False
    )
    for changed in (dynamic, packed, eight):
        with pytest.raises(CompileError, match=r"is a \w+ whose .* before it was quantized$"):
            capture(changed)


# ------------------------------------------------------------------------------------ adapters


def adapter(place: Path, base: str, **settings: Any) -> None:
    place.mkdir(exist_ok=True)
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_"
    low, high = torch.ones(4, WIDTH) * 0.1, torch.ones(WIDTH // 2, 4)
    weights = {name + "A.weight": low, name + "B.weight": high, **settings.pop("more", {})}
    save_file(weights, place / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": 4,
        "lora_alpha": 8, "target_modules": ["v_proj"], **settings,
    }  # fmt: skip
    (place / "adapter_config.json").write_text(json.dumps(config))


def adapted() -> Any:
    model = small()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight += 2.0 * 4 * 0.1
    return model


def test_an_adapter_without_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mergec.compiler.frontend.adapters.importlib.util.find_spec", lambda _: None
    )
    adapter(folder, "somebody/model")
    refused(folder, "holds an adapter", "peft", "is not installed", "mergec[adapters]")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "without adapter_model.safetensors")


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_merged(folder: Path, tmp_path: Path, alone: bool) -> None:
    pytest.importorskip("peft")
    place = tmp_path / "adapter" if alone else folder
    adapter(place, str(folder))
    model, _ = load_model(place)
    with torch.no_grad():
        assert error(model(tokens()).logits, adapted()(tokens()).logits) < 1e-5
        assert error(model(tokens()).logits, small()(tokens()).logits) > 1e-2


def test_an_adapter_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapter(tmp_path / "a", "somebody/model")
    refused(tmp_path / "a", "'somebody/model', which is not a folder on this machine")
    name = "base_model.model.model.layers.7.self_attn.v_proj.lora_A.weight"
    adapter(tmp_path / "b", str(folder), more={name: torch.ones(4, WIDTH)})
    refused(tmp_path / "b", name)


# ---------------------------------------------------------------------------------------- GGUF


FACTORS = [1.0, 1.0, 4.0, 8.0]


def plain(**changes: Any) -> Any:
    return small(num_key_value_heads=4, rms_norm_eps=1e-5, **changes)


def write_gguf(path: Path, *, factors: bool = False, extra: str = "", **settings: Any) -> Path:
    import gguf

    model = plain()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(model.config.vocab_size)
    for key, value in settings.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.{key.replace('__', '.')}", value)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for key, tensor in model.state_dict().items():
        name = names[key.removesuffix(".weight").removeprefix("model.layers.0.")]
        value = tensor
        if name in ("attn_q", "attn_k"):
            value = tensor.view(4, 2, 4, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)
        block = "blk.0." if "layers" in key else ""
        writer.add_tensor(f"{block}{name}.weight", value.contiguous().numpy())
    if factors:
        writer.add_tensor("rope_freqs.weight", torch.tensor(FACTORS).numpy())
    if extra:
        writer.add_tensor(extra, torch.ones(3).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(path: Path, wanted: Any) -> None:
    model, _ = load_model(path)
    with torch.no_grad():
        assert error(model(tokens(20)).logits, wanted(tokens(20)).logits) < 1e-5


def test_a_plain_gguf(tmp_path: Path) -> None:
    same(write_gguf(tmp_path / "a.gguf"), plain())
    same(write_gguf(tmp_path / "b.gguf", rope__scaling__type="none"), plain())


def test_linear_scaling(tmp_path: Path) -> None:
    rope = {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
    wanted = plain(rope_parameters=rope)
    scaled = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    same(write_gguf(tmp_path / "a.gguf", **scaled), wanted)
    same(write_gguf(tmp_path / "b.gguf", rope__scale_linear=4.0), wanted)


def test_rotary_factors(tmp_path: Path) -> None:
    wanted = plain()
    rotary = wanted.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq / torch.tensor(FACTORS)
    same(write_gguf(tmp_path / "a.gguf", factors=True), wanted)
    rotary.inv_freq = rotary.inv_freq / 4.0
    scaled = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    same(write_gguf(tmp_path / "b.gguf", factors=True, **scaled), wanted)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, "scaling.type is yarn"),
        ({"attention__scale": 0.5}, "llama.attention.scale = 0.5, which is not read"),
        ({"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping"),
        ({"extra": "blk.0.attn_q_norm.weight"}, "blk.0.attn_q_norm.weight"),
    ],
)
def test_what_is_not_read_of_a_gguf(tmp_path: Path, settings: Any, words: str) -> None:
    refused(write_gguf(tmp_path / "a.gguf", **settings), words)


def test_a_gguf_gives_a_model_that_can_be_converted_and_saved(tmp_path: Path) -> None:
    model, _ = load_model(write_gguf(tmp_path / "a.gguf"))
    model.half().float().save_pretrained(tmp_path / "saved")
    assert not getattr(model.config, "quantization_config", None)
    again, _ = load_model(tmp_path / "saved")
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_a_cut_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    whole = path.read_bytes()
    for part in (0, 10, 300, len(whole) - 2000):
        path.write_bytes(whole[:part])
        refused(path, "cut or damaged", "download it again")
