"""Multi-head latent attention caches keys and values, instead of what they follow from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def has_latents(model: nn.Module) -> bool:
    """Whether the model caches latents, as transformers does for DeepSeek and its relatives."""
    return bool(_expanding(model))


@contextlib.contextmanager
def expanded(model: nn.Module, past: Any) -> Iterator[None]:
    """Let layers that would cache latents in `past` put keys and values there.

    past: a cache of transformers.

    In the clear latents save memory. Secret ones would be expanded by a product, truncated and
    opened again in each step, for all cached tokens. A key follows from its own token's latent
    alone, so expanding it before it is cached is exact, and a step opens those of new tokens only.
    """
    append, found = past.update, _expanding(model)

    def update(keys: Any, values: Any, layer: int, *args: Any, **options: Any) -> Any:
        if layer in found:
            return keys, values
        return append(keys, values, layer, *args, **options)

    def expand(own: Callable[..., Any], layer: int) -> Callable[..., Any]:
        return lambda *latents: append(*own(*latents), layer)

    past.update = update
    for layer, module in found.items():
        module.expand_kv = expand(module.expand_kv, layer)
    try:
        yield
    finally:
        del past.update
        for module in found.values():
            del module.expand_kv


def _expanding(model: nn.Module) -> dict[int, Any]:
    """The attentions that expand latents, by layer."""
    modules: Iterator[Any] = model.modules()
    return {module.layer_idx: module for module in modules if hasattr(module, "expand_kv")}
