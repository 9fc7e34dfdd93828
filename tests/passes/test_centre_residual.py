"""LayerNorms become RMSNorms where everything that writes their stream can be centred."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.passes.harness import Graph, normal, rewrites

NAMES = ("remove_noops", "unify_spellings", "fuse_layer_norm", "embedding_to_dialect",
         "linear_to_dialect", "arithmetic_to_dialect", "fold_norm_affine",
         "centre_residual")  # fmt: skip
IDS = torch.tensor([[3, 1, 4]])
TABLE, W, V, B = normal(9, 6) + 1, normal(6, 6), normal(4, 6), normal(6)


def norm(x):
    return F.layer_norm(x, (6,))


def test_products_and_tables_are_centred() -> None:
    """The table and the bias have means of their own, which no norm may see afterwards."""

    def body(m, ids):
        x = F.embedding(ids, m.t)
        x = x + F.linear(norm(x), m.w, m.b)
        return F.linear(norm(x), m.v)

    graph = Graph(body, IDS, t=TABLE, w=W, b=B, v=V)
    found = rewrites(graph, *NAMES, sites=2)
    assert found == {"mpc.embedding": 1, "mpc.rms_norm": 2, "mpc.linear": 2, "mpc.add": 1}
    for name in ("t_folded", "w_folded"):
        made = getattr(graph.module, name)
        rows = made if name == "t_folded" else made.T
        assert float(rows.mean(-1).abs().max()) < 1e-12


def test_a_tied_table_is_centred_as_it_is_read() -> None:
    def body(m, ids):
        x = F.embedding(ids, m.t)
        return F.linear(norm(x + F.linear(norm(x), m.w)), m.t)

    found = rewrites(Graph(body, IDS, t=TABLE, w=W), *NAMES, sites=2)
    assert (found["mpc.centre"], found["mpc.rms_norm"]) == (1, 2)


def test_a_stream_from_outside_keeps_its_means() -> None:
    def body(m, x):
        return F.linear(norm(x + F.linear(norm(x), m.w)), m.v)

    graph = Graph(body, normal(1, 3, 6), w=W, v=V)
    assert rewrites(graph, *NAMES, sites=0)["mpc.layer_norm"] == 2
