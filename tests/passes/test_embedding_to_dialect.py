from __future__ import annotations

import torch
import torch.nn.functional as F

from mergec.runtime.core.spec import Vis
from tests.passes.harness import Graph, leaves, normal, rewrites

NAME = "embedding_to_dialect"
IDS, TABLE = torch.tensor([[1, 4, 0]]), normal(5, 8)


def test_a_table_of_the_server() -> None:
    graph = Graph(lambda m, ids: F.embedding(ids, m.w, padding_idx=0), IDS, w=TABLE)
    assert rewrites(graph, NAME) == {"mpc.embedding": 1}
    (node,) = [n for n in graph.module.graph.nodes if n.op == "call_function"]
    assert node.meta["vis"] is Vis.SHARED


def test_public_positions_stay_with_the_server() -> None:
    graph = Graph(lambda m, ids: F.embedding(ids, m.w), IDS, w=TABLE, public=(0,))
    assert rewrites(graph, NAME) == {"mpc.embedding": 1}
    (node,) = [n for n in graph.module.graph.nodes if n.op == "call_function"]
    assert node.meta["vis"] is Vis.SERVER


def test_near_miss_everything_is_public() -> None:
    leaves(Graph(lambda m, ids: F.embedding(ids, m.w), IDS, _w=TABLE, public=(0,)), NAME)


def test_near_miss_a_computed_table() -> None:
    graph = Graph(lambda m, ids: F.embedding(ids, m.w * 2.0), IDS, w=TABLE)
    leaves(graph, NAME, reason="computed at run time")


def test_near_miss_another_way_to_read() -> None:
    leaves(Graph(lambda m, ids: m.w[ids] * 2.0, IDS, w=TABLE), NAME)
