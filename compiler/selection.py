"""Which passes run: by the preset, by `enable` and `disable`, and by an adapted model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergec.compiler.config import PRESETS, CompileConfig
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.adaptation import read_adaptation
from mergec.compiler.graph.manager import ordered
from mergec.compiler.graph.rewriting import Pass
from mergec.passes import available


def resolved(config: CompileConfig) -> CompileConfig:
    """The options with the preset, the passes, the prompts and the drafts of the adapted folder.

    Raises CompileError if other options than those ask for another preset, or leave out a pass.
    """
    if not config.adapted:
        return config
    adaptation = read_adaptation(config.adapted)
    if config.preset not in ("exact", adaptation.preset):
        raise CompileError(
            f"{config.adapted} was adapted for the preset {adaptation.preset!r}, not for "
            f"{config.preset!r}; leave out the preset, or adapt the model for the other one"
        )
    dropped = [name for name in adaptation.passes if name in config.disable]
    if dropped:
        raise CompileError(
            f"{config.adapted} was trained for the pass {dropped[0]!r}; do not disable it"
        )
    return replace(
        config,
        preset=adaptation.preset,
        enable=tuple(dict.fromkeys((*adaptation.enable, *config.enable))),
        calibration=config.calibration or adaptation.calibration,
        # Heads are for drafts that a step checks.
        speculate_up_to=max(config.speculate_up_to, adaptation.medusa),
    )


def select(config: CompileConfig) -> list[type[Pass]]:
    """The passes that `config` asks for, in the order in which they run.

    Raises CompileError if `enable` or `disable` names an unknown pass, if both name one, or if the
    passes' `after` cannot be satisfied.
    """
    known = available()
    optional = [name for name in config.enable if name in known and known[name].option]
    if optional:
        option = known[optional[0]].option
        raise CompileError(f"the pass {optional[0]!r} runs by the option {option}; set that")
    both = sorted({*config.enable} & {*config.disable})
    if both:
        raise CompileError(f"the pass {both[0]!r} is both enabled and disabled; leave out one")
    check_names((*config.enable, *config.disable))
    asked = {*PRESETS[config.preset], *config.enable}
    chosen = [
        kind
        for name, kind in known.items()
        if (kind.exact or name in asked)
        and name not in config.disable
        and (not kind.option or getattr(config, kind.option))
    ]
    for kind in config.extra_passes:
        if not issubclass(kind, Pass):
            raise CompileError(
                f"extra_passes holds {kind.__qualname__}, which is not a subclass of mergec.Pass"
            )
    return ordered([*chosen, *config.extra_passes], known.values())


def check_names(names: Sequence[str]) -> None:
    """Raise CompileError, with the known names, if there is no pass of one of these names."""
    known = available()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CompileError(f"unknown pass {unknown[0]!r}; there are: {', '.join(sorted(known))}")


def runs_anyway(config: CompileConfig) -> list[str]:
    """The passes that `enable` names needlessly: exact ones, and those of the preset."""
    known = available()
    return [name for name in config.enable if known[name].exact or name in PRESETS[config.preset]]


def left_out(config: CompileConfig) -> dict[str, str]:
    """Why each pass that `config` does not ask for was left out, by name."""
    chosen, known = {kind.name() for kind in select(config)}, available()
    return {
        name: "the option `disable` names it"
        if name in config.disable
        else f"the option `{known[name].option}` does not ask for it"
        if known[name].option
        else f"it is lossy, and the preset {config.preset!r} does not ask for it; "
        "--enable NAME does"
        for name in sorted(known)
        if name not in chosen
    }
