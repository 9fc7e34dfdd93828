"""Reads of a GGUF file what transformers leaves out, and refuses what nobody reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from mergec.compiler.errors import CompileError

_ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, as in Llama 3.1 and later."""

_SCALING = "rope.scaling."
_FORMER_SCALE = "rope.scale_linear"

_SAME = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Settings that transformers may not read, and where the model must have the same value."""

_IDLE = {
    "use_parallel_residual",  # transformers sees it from the tensors
    "tensor_data_layout",
    "attention.causal",
    f"{_SCALING}finetuned",
    f"{_SCALING}original_context_length",  # only kinds of scaling that are refused use it
}
"""Settings that change nothing in a decoder."""


class GgufFile:
    """The metadata and the tensors' names of a GGUF file."""

    def __init__(self, path: Path) -> None:
        """Raises CompileError if the file cannot be read."""
        from gguf import GGUFReader

        self.path = path
        try:
            self._reader = GGUFReader(path)
            self._fields = {name: f.contents() for name, f in self._reader.fields.items()}
        except Exception as error:  # the reader raises what numpy does
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CompileError(
                f"{path} cannot be loaded as a decoder: it is cut or damaged ({lines[0]}); copy or "
                "download it again"
            ) from error
        self._kind = str(self._fields.get("general.architecture", ""))

    def complete(self, config: Any) -> None:
        """Put the rotary scaling of the file into a model's configuration.

        Raises CompileError for a kind of scaling that cannot be read.
        """
        kind = self._setting(f"{_SCALING}type")
        factor = self._setting(f"{_SCALING}factor") or self._setting(_FORMER_SCALE)
        kind = kind or ("linear" if factor else "none")
        if kind == "none" or (kind == "linear" and float(factor or 1.0) == 1.0):
            return
        rope = getattr(config, "rope_parameters", None)
        if kind != "linear" or not isinstance(rope, dict):
            raise CompileError(
                f"{self.path} scales rotary frequencies in a way that is not read from GGUF files "
                f"({self._kind}.{_SCALING}type is {kind}); give the model's folder instead"
            )
        if rope.get("rope_type") != kind:
            config.rope_parameters = {**rope, "rope_type": kind, "factor": float(factor)}

    def finish(self, model: Any) -> None:
        """Apply to a loaded model what the loader did not read.

        Raises CompileError, which names it, for a tensor or a setting that nobody reads.
        """
        self._check_settings(model)
        for name in self._unread(model):
            if name != _ROPE_FACTORS:
                raise CompileError(
                    f"{self.path} holds the tensor {name}, which a {type(model).__name__} has no "
                    "place for; give the model's folder instead"
                )
            self._apply_factors(model)

    def _setting(self, name: str) -> Any:
        return self._fields.get(f"{self._kind}.{name}")

    def _unread(self, model: Any) -> list[str]:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        processor = TENSOR_PROCESSORS.get(self._kind, TensorProcessor)(config={})
        read = get_gguf_hf_weights_map(model, processor)
        names = [tensor.name for tensor in self._reader.tensors]
        # Some files repeat the rotary frequencies, as former checkpoints did.
        return [name for name in names if name not in read and "attn_rot_embd" not in name]

    def _apply_factors(self, model: Any) -> None:
        from gguf import dequantize

        (held,) = [tensor for tensor in self._reader.tensors if tensor.name == _ROPE_FACTORS]
        factors = torch.tensor(dequantize(held.data, held.tensor_type)).flatten()
        found = [m for m in model.modules() if hasattr(m, "original_inv_freq")]
        # Both scalings are products, so their order does not matter.
        simple = [m for m in found if m.rope_type in ("default", "linear")]
        fits = [m for m in simple if m.inv_freq.shape == factors.shape]
        if not fits or fits != found or not bool((factors > 0).all()):
            raise CompileError(
                f"{self.path} holds rotary factors ({_ROPE_FACTORS}) that do not fit this model; "
                "give the model's folder instead"
            )
        for module in fits:
            scaled = module.inv_freq / factors
            module.inv_freq.copy_(scaled)
            module.original_inv_freq = scaled.clone()

    def _check_settings(self, model: Any) -> None:
        from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

        known = GGUF_TO_TRANSFORMERS_MAPPING["config"].get(model.config.model_type, {})
        handled = {f"{_SCALING}type", f"{_SCALING}factor", _FORMER_SCALE, *_IDLE}
        for key, value in self._fields.items():
            kind, _, name = key.partition(".")
            if kind != self._kind or known.get(name) is not None or name in handled:
                continue
            if not _agrees(name, value, model):
                raise CompileError(
                    f"{self.path} has the setting {key} = {str(value)[:40]}, which is not read; "
                    "give the model's folder instead"
                )


def _agrees(name: str, value: Any, model: Any) -> bool:
    """Whether the model has this setting, by a value of its own."""
    config = model.config
    if name == "rope.dimension_count":
        tables = [b for key, b in model.named_buffers() if key.endswith("inv_freq")]
        return all(2 * table.numel() == value for table in tables)
    if name not in _SAME:
        return False
    own = getattr(config, _SAME[name], None)
    if own is None and _SAME[name] == "head_dim":
        own = config.hidden_size // config.num_attention_heads
    if own is None and _SAME[name] == "rope_theta":
        own = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    numbers = isinstance(own, (int, float)) and isinstance(value, (int, float))
    return numbers and math.isclose(own, value, rel_tol=1e-6)  # type: ignore[arg-type]
