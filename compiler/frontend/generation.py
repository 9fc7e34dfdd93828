"""Reads the generation settings of a checkpoint, and names those that cannot be honoured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mergec.compiler.errors import CompileError
from mergec.runtime.core.draw import MAX_TEMPERATURE, MAX_TOP_K
from mergec.runtime.core.errors import BundleError
from mergec.runtime.program.generation_settings import NAMES, GenerationSettings, cut

_NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "encoder_repetition_penalty": 1,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "length_penalty": 1,
    "token_healing": False,
    "use_mtp": False,
}
"""The value of each setting that changes nothing. None, and an empty list, never do."""

_IMPOSSIBLE = {
    "num_beams": "beam search is not supported",
    "num_beam_groups": "beam search is not supported",
    "constraints": "beam search is not supported",
    "force_words_ids": "beam search is not supported",
    "num_return_sequences": "an answer is one sequence",
    "penalty_alpha": "contrastive search is not supported",
    "dola_layers": "it needs the logits of inner layers",
    "guidance_scale": "it needs a second run of the model for each token",
    "length_penalty": "it ranks the answers of a beam search",
    "watermarking_config": "watermarks are not supported",
    "token_healing": "prompts are not changed",
    "stop_strings": "only tokens end an answer; name the strings in each request to the endpoint",
    "max_time": "steps have no time limit",
    "assistant_early_exit": "there is no assistant model",
    "assistant_ensemble_weight": "there is no assistant model",
    "prompt_lookup_num_tokens": "each step generates one token",
    "speculation_type": "each step generates one token",
    "use_mtp": "each step generates one token",
}
"""Settings that no program can honour, and why."""

_BEAMS = frozenset({"num_beams", "num_beam_groups", "constraints", "force_words_ids"})
"""Settings that ask for a beam search. Without one, a length penalty changes nothing."""


def generation_settings(
    model: Any, *, reveal: str, ignored: Collection[str] = (), vocab_size: int = 0
) -> GenerationSettings:
    """The settings in `model.generation_config`; none if it has no such attribute.

    reveal: what the client will learn of a step. ignored: settings to leave out. vocab_size: number
    of tokens that the model knows; 0 if unknown.

    Raises CompileError in one line if a setting that changes answers cannot be honoured or has a
    value that it cannot have, or if `ignored` names no setting.
    """
    unknown = [name for name in ignored if name not in (*NAMES, *_IMPOSSIBLE)]
    if unknown:
        raise CompileError(
            f"ignore_settings names {unknown[0]!r}, which is no generation setting; there are: "
            f"{', '.join(sorted((*NAMES, *_IMPOSSIBLE)))}"
        )
    found = _stated(getattr(model, "generation_config", None), ignored)
    try:
        settings = GenerationSettings(**{name: found[name] for name in NAMES if name in found})
        settings.check_tokens(vocab_size)
    except BundleError as error:
        raise CompileError(
            f"the checkpoint's generation_config is invalid: {error}; correct it, or leave the "
            "setting out with ignore_settings, on the command line --ignore-setting"
        ) from error
    refused = _refused(found)
    if reveal == "token":
        hidden = [name for name, value in settings.to_dict().items() if _needs_logits(name, value)]
        refused |= dict.fromkeys(hidden, 'reveal="token" hides the logits that it needs')
    if refused:
        raise CompileError(_refusal(found, refused))
    return settings


def impossible_settings(model: Any) -> tuple[str, ...]:
    """The settings in `model.generation_config` that no program can honour, by name."""
    return tuple(_refused(_stated(getattr(model, "generation_config", None), ())))


def _refused(found: Mapping[str, Any]) -> dict[str, str]:
    """Why settings that are stated cannot be honoured, by name."""
    beams = bool(_BEAMS & found.keys())
    return {
        name: why
        for name, why in _IMPOSSIBLE.items()
        if name in found and (beams or name != "length_penalty")
    }


def _needs_logits(name: str, value: Any) -> bool:
    """Whether the parties cannot honour a setting where the client learns the token alone."""
    if name == "temperature":
        return bool(value > MAX_TEMPERATURE)
    return bool(value > MAX_TOP_K) if name == "top_k" else name != "do_sample"


def _stated(config: Any, ignored: Collection[str]) -> dict[str, Any]:
    """The settings of a generation_config that are not neutral, as JSON values by name."""
    found = {}
    for name in (*NAMES, *_IMPOSSIBLE):
        value = _as_json(getattr(config, name, None))
        if value is None or value in ([], {}) or name in ignored:
            continue
        if name in _NEUTRAL and value == _NEUTRAL[name] and _is_like(value, _NEUTRAL[name]):
            continue
        found[name] = value
    return found


def _is_like(value: Any, other: Any) -> bool:
    """Whether both are truth values, or neither is: True is equal to 1, and not a penalty."""
    return isinstance(value, bool) == isinstance(other, bool)


def _as_json(value: Any) -> Any:
    """Lists for tuples; a list of pairs for the dictionary of biases by tuples of tokens."""
    if isinstance(value, Mapping):
        return [[_as_json(key), _as_json(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value


def _refusal(found: Mapping[str, Any], refused: Mapping[str, str]) -> str:
    said = ", ".join(f"{name}={cut(found[name])} ({why})" for name, why in refused.items())
    other = 'compile with reveal="logits", or ' if any(name in NAMES for name in refused) else ""
    names = ", ".join(repr(name) for name in refused)
    options = " ".join(f"--ignore-setting {name}" for name in refused)
    comma = "," if len(refused) == 1 else ""
    return (
        f"generation settings of the checkpoint cannot be honoured: {said}; {other}leave them out "
        f"with ignore_settings=({names}{comma}), on the command line {options}"
    )
