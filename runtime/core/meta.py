"""Shapes without torch's compiler."""

from __future__ import annotations

import inspect
import sys

import torch


def compute_shapes_alone() -> None:
    """Keep torch from importing its compiler when it computes shapes.

    Some operations on meta tensors are Python functions of torch. Each tells torch's compiler not
    to trace it, and the first that is called imports the compiler for this: a second of work, and
    900 modules. A party compiles nothing, so here they have told already. Only for processes of a
    party's own, because the functions would be traced if something else there compiled them. Does
    nothing if the compiler is loaded, or if another version of torch does this in another way.
    """
    if "torch._dynamo" in sys.modules:
        return
    for function in vars(torch._refs).values():
        while inspect.isfunction(function) and hasattr(function, "__wrapped__"):
            wrapper, function = function, function.__wrapped__
            if wrapper.__code__.co_filename == torch._compile.__file__:
                function.__dynamo_disable = function
