"""Make buffers public that only say where a token may attend."""

from __future__ import annotations

import torch
from torch import fx

from mergec.compiler.graph.ir import constant
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.spec import Vis

_SMALLEST = 4
_LOW = -1e4


class PublishMasks(Pass):
    """Makes a causal mask or a range of positions public that is stored as a persistent buffer.

    Such a buffer would be treated as a weight, although its content follows from its shape and
    contains nothing from training. All other persistent buffers stay with the server.

    Before:
        %x = input : shared 1xnewx8
        %mask = constant causal : server 8x8
        %1 = aten.select.int(%mask, 0, 0)
        %2 = aten.mul.Tensor(%x, %1)
    After:
        %mask = constant : public 8x8
        %1 = aten.select.int(%mask, 0, 0)
        %2 = aten.mul.Tensor(%x, %1)
    """

    stage = "canonicalize"

    def run(self, graph_module: fx.GraphModule) -> int:
        found = set()
        for node in graph_module.graph.nodes:
            value = constant(graph_module, node)
            if value is None or self.info.constants.get(str(node.target)) is not Vis.SERVER:
                continue
            if _follows_from_shape(value):
                found.add(str(node.target))
        self.info.constants.update(dict.fromkeys(found, Vis.PUBLIC))
        return len(found)


def _follows_from_shape(value: torch.Tensor) -> bool:
    plain = value.squeeze()
    if plain.dim() == 1 and plain.dtype is torch.int64 and len(plain) >= _SMALLEST:
        return torch.equal(plain, torch.arange(len(plain)))
    if plain.dim() != 2 or plain.shape[0] != plain.shape[1] or len(plain) < _SMALLEST:
        return False
    seen = torch.ones_like(plain, dtype=torch.bool).tril()
    inside, outside = plain[0, 0], plain[0, 1]
    if not (bool((plain[seen] == inside).all()) and bool((plain[~seen] == outside).all())):
        return False
    pair = (float(inside), float(outside))
    return pair in ((1.0, 0.0), (0.0, 1.0)) or (pair[0] == 0.0 and pair[1] <= _LOW)
