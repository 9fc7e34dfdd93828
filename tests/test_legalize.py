"""Where truncations and openings are placed, and which values leave the ring."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
import torch
from torch import fx

from mergec.compiler.backend.legalize import RANGE_MARGIN_BITS, WEIGHT_BITS, legalize
from mergec.compiler.config import CompileConfig
from mergec.compiler.errors import CompileError
from mergec.compiler.frontend.capture import capture
from mergec.compiler.graph.ir import bind, op_of
from mergec.compiler.graph.moves import is_move, known_size, moved
from mergec.compiler.graph.ranges import annotate_ranges
from mergec.compiler.pipeline import assemble, rewrite, to_dialect
from mergec.compiler.text import dump
from mergec.runtime.core.op import REGISTRY, Op
from mergec.runtime.core.spec import HEADROOM_BITS, SHARE_FRAC, WINDOW_FRAC, Vis
from mergec.runtime.core.structural import target_name
from mergec.runtime.ops import load_all
from mergec.runtime.program.program import InputSpec
from tests.conftest import Golden
from tests.families import captured, every_family, float_decoder, random_decoder
from tests.passes.harness import Graph, normal

load_all()
FIXED = 16
X, W = normal(1, 3, 8), normal(8, 8)
ALL = ("remove_noops", "unify_spellings", "fuse_attention", "fuse_activations", "fuse_rms_norm",
       "fuse_layer_norm", "fuse_rotary", "linear_to_dialect", "arithmetic_to_dialect")  # fmt: skip


def legal(graph: Graph) -> Graph:
    for name in ALL:
        graph.run(name)
    legalize(graph.module, FIXED)
    assert graph.same()
    return graph


def named(graph: Graph, op: str) -> list[fx.Node]:
    return [n for n in graph.module.graph.nodes if target_name(n.target) == f"mpc.{op}"]


def test_a_wire_is_converted_once() -> None:
    """Three products with weights and one with itself: truncated once, sent once."""

    def body(m, x):
        y = x @ m.w
        return y @ m.a + y @ m.b + y @ m.c, y * y

    graph = legal(Graph(body, X, w=W, a=W + 1, b=W + 2, c=W + 3))
    count = Counter(target_name(n.target) for n in graph.module.graph.nodes)
    (truncated,) = [n for n in named(graph, "truncate") if "linear" in str(n.args[0].target)]
    sent = [n for n in named(graph, "send") if n.args[0] is truncated]
    assert len(sent) == 1
    assert len(sent[0].users) == 3
    assert count["mpc.send"] == 2, "the input, and the product"


def test_a_part_of_an_opened_wire_needs_no_opening() -> None:
    def body(m, x):
        y = x @ m.w
        return y @ m.a, y[:, -1:].reshape(1, 8) @ m.b

    graph = legal(Graph(body, X, w=W, a=W + 1, b=W + 2))
    once(graph.module)
    assert len(named(graph, "send")) == 2, "the input, and the product"


def test_parts_that_are_all_needed_are_opened_together() -> None:
    def body(m, x):
        gate, up = (x @ m.w).split(4, -1)
        return gate * up

    graph = legal(Graph(body, X, w=W))
    assert [n.meta["val"].shape[-1] for n in named(graph, "truncate")] == [8, 4], "and the result"

    def half(m, x):
        y = x @ m.w
        return y[..., :2] * y[..., 2:4]

    graph = legal(Graph(half, X, w=W))
    assert [n.meta["val"].shape[-1] for n in named(graph, "truncate")] == [2, 2, 2]


def once(graph_module: fx.GraphModule) -> None:
    """No element of a wire is opened, sent or truncated twice, however it is moved.

    Each conversion is traced back to the wire's source, where the elements are marked.
    """
    seen: dict[tuple[fx.Node, str], torch.Tensor] = {}
    for node in graph_module.graph.nodes:
        if target_name(node.target) not in ("mpc.open", "mpc.send", "mpc.truncate"):
            continue
        moves = [node.args[0]]
        while is_move(moves[-1]) or target_name(moves[-1].target) == "mpc.truncate":
            if target_name(node.target) == "mpc.truncate" and not is_move(moves[-1]):
                break
            moves.append(moves[-1].args[0])
        root = moves.pop()
        shape = [known_size(size) for size in root.meta["val"].shape]
        numbers = torch.arange(math.prod(shape)).reshape(shape)
        for move in reversed([m for m in moves if is_move(m)]):
            numbers = moved(move, numbers)
        count = seen.setdefault((root, str(node.target)), torch.zeros(math.prod(shape)))
        count[numbers.flatten()] += 1
        assert count.max() == 1, node


@every_family()
def test_no_wire_is_opened_twice(family: str) -> None:
    step = captured(family)
    rewrite(step, CompileConfig())
    legalize(step.graph_module, FIXED)
    once(step.graph_module)


def test_sums_of_products_are_truncated_once() -> None:
    graph = legal(Graph(lambda m, x: (x @ m.w + x @ m.v + x) * 1.0, X, w=W, v=W + 1))
    before = [n.meta["frac"] for n in named(graph, "add")]
    assert before == [2 * FIXED, 2 * FIXED]


def test_every_operand_is_in_the_form_its_op_takes() -> None:
    program = to_dialect(float_decoder("gemma2")[1].copy(), CompileConfig())
    legalize(program.graph_module, FIXED)
    checked = 0
    for node in program.graph_module.graph.nodes:
        op = op_of(node)
        if op is None or node.meta["vis"] is not Vis.SHARED:
            continue
        arguments = bind(op, node)
        for parameter, form in op.forms(*arguments.values()).items():
            value = arguments[parameter]
            if not isinstance(value, fx.Node) or value.meta["vis"] is not Vis.SHARED:
                continue
            checked += 1
            if form == "fixed":
                assert value.meta["frac"] == FIXED
            elif form == "window":
                assert value.meta["frac"] <= WINDOW_FRAC
            elif form == "cache":
                assert value.meta["form"] in ("masked", "sent")
            elif form != "share":
                assert value.meta["form"] == form
    assert checked > 50


def test_cache_outputs_have_the_form_of_cache_inputs() -> None:
    program = to_dialect(float_decoder("falcon")[1].copy(), CompileConfig())
    legalize(program.graph_module, FIXED)
    nodes = list(program.graph_module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"][1:]
    for node in (*inputs, *nodes[-1].args[0][1:]):
        assert (node.meta["form"], node.meta["frac"]) == ("masked", FIXED)


def attention(scale: float) -> Graph:
    def body(m, q, k, v):
        return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v

    return legal(Graph(body, *(normal(1, 2, 3, 16, seed=i) for i in range(3))))


def test_a_scale_that_is_a_power_of_two_is_free() -> None:
    graph = attention(0.25)
    assert not named(graph, "scale")
    assert named(graph, "attention")[0].args[4] == 0.25


def test_another_scale_goes_to_the_queries() -> None:
    graph = attention(1 / math.sqrt(8))
    (scale,) = named(graph, "scale")
    (node,) = named(graph, "attention")
    assert node.args[4] == 1.0
    chain = node.args[0]
    while chain is not scale:
        chain = chain.args[0]
    assert scale.args[1] == 1 / math.sqrt(8)


def test_norms_learn_how_large_their_rows_get() -> None:
    program = to_dialect(float_decoder("llama")[1].copy(), CompileConfig())
    nodes = [n for n in program.graph_module.graph.nodes if "rms_norm" in str(n.target)]
    squares = [node.meta["mean_square"] for node in nodes]
    legalize(program.graph_module, FIXED)
    for node, square in zip(nodes, squares, strict=True):
        assert 0 < square < node.args[4]


def test_a_value_without_headroom_is_named() -> None:
    graph = Graph(lambda m, x: x @ m.w + x, X, w=W)
    for name in ALL:
        graph.run(name)
    (product,) = named(graph, "linear")
    product.meta["module"], product.meta["source"] = "layers.0.up", "model.py:7"
    limit = 2.0 ** (HEADROOM_BITS - RANGE_MARGIN_BITS - 2 * FIXED)
    product.meta["range"] = (0.0, limit * 1.01)
    with pytest.raises(CompileError) as caught:
        legalize(graph.module, FIXED)
    text = str(caught.value)
    assert re.match(r"values that the ring cannot hold\n  %[\w.]+ = mpc.linear\(", text)
    assert "# layers.0.up  model.py:7" in text
    assert "reaches 1.36e+08 in calibration, which with 32 fractional bits" in text
    assert list(caught.value.nodes) == [product]


class Sinks(torch.nn.Module):
    """A decoder whose attention has one more column of scores, which no pass recognizes."""

    def __init__(self, hidden: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = hidden
        self.embedding = torch.nn.Embedding(16, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        mask = torch.full((ids.shape[1], ids.shape[1]), self.hidden).triu(1)
        scores = x @ x.transpose(-1, -2) + mask
        weights = torch.cat([scores, x[..., :1]], -1).softmax(-1)[..., :-1]
        return weights @ x @ self.embedding.weight.T


def test_a_mask_that_stays_in_an_attention_is_named() -> None:
    config = CompileConfig(max_length=64)
    for hidden, shown in ((torch.finfo(torch.float32).min, "-3.4e+38"), (-1e9, "-1e+09")):
        with pytest.raises(CompileError) as caught:
            assemble(to_dialect(capture(Sinks(hidden)), config), config)
        text = str(caught.value)
        assert text.startswith("values that the ring cannot hold\n")
        assert (
            f"reaches {shown} in calibration, because a mask is added to scores of an attention "
            "that the pass fuse_attention did not recognize (the scores come from aten.cat.default)"
        ) in text
        assert "check this module's weights" not in text
    assemble(to_dialect(capture(Sinks(-10_000.0)), config), config)


def test_a_mask_without_a_known_attention_is_named() -> None:
    graph = Graph(lambda m, x: x @ m.w + x, X, w=W)
    for name in ALL:
        graph.run(name)
    (product,) = named(graph, "linear")
    product.meta["range"] = (-3e38, 1.0)
    with pytest.raises(CompileError, match="probably because a mask is added to scores"):
        legalize(graph.module, FIXED)
    graph = Graph(lambda m, x: x @ m.w + x, X, w=W)
    for name in ALL:
        graph.run(name)
    named(graph, "linear")[0].meta["range"] = (-3e38, 3e38)
    with pytest.raises(CompileError, match="check this module's weights"):
        legalize(graph.module, FIXED)


@pytest.mark.parametrize(
    ("least", "most", "masked"),
    [
        (-(2.0**110), 2.0**100, True),
        (-(2.0**110), 2.0**100 * 1.001, False),
        (-(2.0**100) * 1.001, 1.0, True),
        (-(2.0**100), 1.0, False),
    ],
)
def test_scores_under_a_mask_are_far_below_zero(least: float, most: float, masked: bool) -> None:
    """Beyond 2**100, and 2**10 times as far as they are above it."""
    graph = Graph(lambda m, x: x @ m.w + x, X, w=W)
    for name in ALL:
        graph.run(name)
    named(graph, "linear")[0].meta["range"] = (least, most)
    words = "because a mask is added" if masked else "check this module's weights"
    with pytest.raises(CompileError, match=words):
        legalize(graph.module, FIXED)


def test_values_of_two_parties_side_by_side_are_a_share() -> None:
    """Each adds its own to zeros: no message, and nothing to truncate."""
    graph = Graph(
        lambda m, ids: torch.cat([ids.double(), m.g]) * m.h,
        torch.tensor([3, 1]),
        g=W[0],
        h=W[1, :1],
    )
    graph.run("arithmetic_to_dialect")
    legalize(graph.module, FIXED)
    nodes = graph.module.graph.nodes
    (joined,) = [n for n in nodes if target_name(n.target) == "aten.cat.default"]
    assert joined.meta["vis"] is Vis.SHARED
    assert (joined.meta["form"], joined.meta["frac"]) == ("share", FIXED)


def test_a_value_with_just_enough_headroom_passes() -> None:
    graph = Graph(lambda m, x: x @ m.w + x, X, w=W)
    for name in ALL:
        graph.run(name)
    limit = 2.0 ** (HEADROOM_BITS - RANGE_MARGIN_BITS - 2 * FIXED)
    named(graph, "linear")[0].meta["range"] = (-limit, 1.0)
    legalize(graph.module, FIXED)


def with_range(body, largest: float, **constants) -> list[int]:
    """Additional bits of each matrix where every value reaches `largest`."""
    graph = Graph(body, X, w=W, **constants)
    for name in ALL:
        graph.run(name)
    for node in graph.module.graph.nodes:
        node.meta["range"] = (-largest, largest)
    legalize(graph.module, FIXED)
    assert graph.same()
    for node in named(graph, "linear"):
        assert node.meta["frac"] == 2 * FIXED + node.args[3]
    return [node.args[3] for node in named(graph, "linear")]


def test_a_matrix_gets_the_bits_that_its_product_has_room_for() -> None:
    room = HEADROOM_BITS - RANGE_MARGIN_BITS - 2 * FIXED
    for spare, bits in ((10, WEIGHT_BITS), (WEIGHT_BITS, WEIGHT_BITS), (2.5, 2), (0, 0)):
        assert with_range(lambda m, x: x @ m.w, 2.0 ** (room - spare)) == [bits]


def test_a_product_has_to_fit_until_it_is_truncated() -> None:
    """Through sums, a rotary embedding's 16 bits, and a LayerNorm that adds up its row."""
    room = HEADROOM_BITS - RANGE_MARGIN_BITS - 2 * FIXED
    added = 2.0 ** (room - 5)
    assert with_range(lambda m, x: (x @ m.w + x).reshape(3, 8), added) == [5]
    norm = 2.0 ** (room - 9)
    assert with_range(lambda m, x: torch.nn.functional.layer_norm(x @ m.w + x, (8,)), norm) == [5]

    def rotated(m, x):
        y = x @ m.w
        return y * m.cos + torch.cat([-y[..., 4:], y[..., :4]], -1) * m.sin

    turned = 2.0 ** (room - 16 - 3)
    tables = {"_cos": normal(3, 8), "_sin": normal(3, 8)}
    assert with_range(rotated, turned, **tables) == [3]

    def revealed_as_well(m, x):
        y = x @ m.w
        return torch.ops.mpc.reveal(y), y * m.cos + torch.cat([-y[..., 4:], y[..., :4]], -1) * m.sin

    assert with_range(revealed_as_well, turned, **tables) == [3]


def test_a_wire_stays_as_fine_as_its_products_have_room_for() -> None:
    """A product of a product has 48 bits if the first is not truncated; the output always is."""

    def truncated(largest: float) -> int:
        graph = Graph(lambda m, x: x @ m.w @ m.v, X, w=W, v=W)
        graph.run("linear_to_dialect")
        _, second = named(graph, "linear")
        second.meta["range"] = (-largest, largest)
        legalize(graph.module, FIXED)
        return len(named(graph, "truncate"))

    most = 2.0 ** (HEADROOM_BITS - RANGE_MARGIN_BITS - 3 * FIXED)
    assert [truncated(most), truncated(1.01 * most)] == [1, 2]


def test_a_value_has_as_many_bits_as_protocols_are_tested_with() -> None:
    """The product with a tiny matrix, of which neither result nor input is large."""
    graph = Graph(lambda m, x: x @ m.w, X, w=W * 2.0**-40)
    graph.run("linear_to_dialect")
    (product,) = named(graph, "linear")
    product.meta["range"] = (-(2.0**-30), 2.0**-30)
    legalize(graph.module, FIXED)
    assert product.meta["frac"] == SHARE_FRAC


def bits_of_constant(size: float, largest: float, uses: int = 1) -> list[int]:
    """Additional bits that products with a constant of this size get, in each of its uses."""
    graph = Graph(
        lambda m, x: tuple((x + float(i)) * m.g for i in range(uses)),
        X, g=size * torch.tensor([1.0, -1.0] * 4).double(),
    )  # fmt: skip
    graph.run("arithmetic_to_dialect")
    for node in graph.module.graph.nodes:
        node.meta["range"] = (-largest, largest)
    legalize(graph.module, FIXED)
    return [(*node.args, 0)[2] for node in named(graph, "mul")]


def test_a_small_constant_gets_the_bits_of_fourteen() -> None:
    """Below 2**-7 it is about 2**14 units."""
    for size, bits in ((1.0, 0), (2.0**-6, 0), (2.0**-7, 0), (2.0**-7.01, 6), (2.0**-10, 8)):
        assert bits_of_constant(size, 2.0) == [bits]


def test_the_smallest_row_of_an_embedding_decides() -> None:
    """Unless it is zero; and one that is far smaller than the largest needs no more than that."""
    for smallest, bits in ((1.0, 0), (2.0**-7, 0), (2.0**-10, 8), (2.0**-14, 12), (2.0**-30, 12),
                           (0.0, 0)):  # fmt: skip
        table = torch.ones(3, 16).double() * torch.tensor([[1.0], [smallest], [1.0]]).double()
        graph = Graph(
            lambda m, ids: torch.nn.functional.embedding(ids, m.w), torch.tensor([[0, 1]]), w=table
        )
        graph.run("embedding_to_dialect")
        (embedded,) = named(graph, "embedding")
        embedded.meta["range"] = (-2.0, 2.0)
        legalize(graph.module, FIXED)
        assert (*embedded.args, 0)[2] == bits


def test_a_tied_constant_has_bits_that_all_uses_have_room_for() -> None:
    """As many as are left of the ring beside a truncation's 48."""
    room = HEADROOM_BITS - RANGE_MARGIN_BITS - 3 * FIXED
    for spare, bits in ((9, 8), (8, 8), (3, 3), (2.5, 2), (0, 0), (-3, 0)):
        assert bits_of_constant(2.0**-10, 2.0 ** (room - spare), uses=2) == [bits, bits]


def test_a_tied_matrix_has_the_bits_of_its_other_use() -> None:
    assert with_range(lambda m, x: (x @ m.w, (x + 1.0) @ m.w), 1.0) == [0, 0]


BOUNDED = {name: op for name, op in REGISTRY.items() if op.domain != Op.domain}
MARGIN = 2.0**RANGE_MARGIN_BITS


def calibrated(name: str, least: float, most: float) -> fx.Graph:
    """A call of an op whose first operand ranges from `least` to `most`."""
    args = REGISTRY[name].cases()[0].args[1:]
    op = getattr(torch.ops.mpc, name)

    def body(m, x):
        rest = (x @ m.v if isinstance(arg, torch.Tensor) else arg for arg in args)
        return op(x @ m.w, *rest)

    graph = Graph(body, X, w=W, v=W + 1)
    graph.run("linear_to_dialect")
    for node in graph.module.graph.nodes:
        node.meta["module"] = "layers.0"
    named(graph, "linear")[0].meta["range"] = (least, most)
    legalize(graph.module, FIXED)
    return graph


def test_some_ops_have_a_domain() -> None:
    assert {"silu", "exp", "log", "reveal", "reveal_token", "reciprocal", "glu"} <= set(BOUNDED)


@pytest.mark.parametrize("name", BOUNDED)
def test_calibration_near_the_end_of_a_domain_is_refused(name: str) -> None:
    """Calibration must stay a factor of eight from an end: 2000 passes for 2**14, 2100 does not."""
    low, high = BOUNDED[name].domain
    least = low * MARGIN if low > 0 else low / MARGIN
    most = high / MARGIN
    assert named(calibrated(name, least * (1.01 if low > 0 else 0.99), most * 0.99), name)
    inside = (least * 1.1 if low > 0 else 0.0, most * 0.9)
    bad = [(least * (0.99 if low > 0 else 1.01), inside[1]), (inside[0], most * 1.01)]
    if low > 0:
        bad += [(-1.0, inside[1]), (0.0, inside[1])]
    for some, largest in bad:
        with pytest.raises(CompileError, match=rf"mpc\.{name}.* # layers\.0") as caught:
            calibrated(name, some, largest)
        assert f"ranges from {some:.3g} to {largest:.3g} in calibration" in str(caught.value)


def scored(size: float, softcap: float = 0.0) -> Graph:
    """Attention of which a row's scores are 0 and `size`, as calibration sees it."""

    def body(m, ids):
        x = torch.nn.functional.embedding(ids, m.w)[None]
        return torch.ops.mpc.attention(x, x, x, None, 1.0, softcap)

    graph = Graph(body, torch.tensor([[0, 1]]), w=torch.eye(2, 16).double() * math.sqrt(size))
    ids = InputSpec("ids", Vis.CLIENT, "torch.int64", (1, "new"))
    annotate_ranges(graph.module, [ids], [[0, 1]])
    return graph


def test_scores_that_are_too_far_apart() -> None:
    legalize(scored(27_000.0).module, FIXED)
    graph = scored(40_000.0)
    assert named(graph, "attention")[0].meta["score_spread"] == pytest.approx(40_000.0)
    with pytest.raises(CompileError, match=r"(?s)mpc.attention.*4e\+04 apart .* up to 32000"):
        legalize(graph.module, FIXED)


def test_values_that_are_too_large_to_be_weighed() -> None:
    """A row of 4,096 of them, eight times as large as in calibration, has to fit into the ring."""

    def graph(size: float) -> Graph:
        def body(m, ids):
            x = torch.nn.functional.embedding(ids, m.w)[None]
            return torch.ops.mpc.attention(x, x, x * size, None, 1.0)

        built = Graph(body, torch.tensor([[0, 1]]), w=torch.eye(2, 16).double())
        ids = InputSpec("ids", Vis.CLIENT, "torch.int64", (1, "new"))
        annotate_ranges(built.module, [ids], [[0, 1]])
        return built

    legalize(graph(256.0).module, FIXED)
    with pytest.raises(CompileError, match=r"(?s)mpc.attention.*values reach 257 .* up to 2048"):
        legalize(graph(257.0).module, FIXED)


def test_scores_that_are_too_large_to_be_capped() -> None:
    legalize(scored(2000.0, softcap=20.0).module, FIXED)
    with pytest.raises(CompileError, match=r"(?s)mpc.attention.*3e\+03 .*cap.* up to 16384"):
        legalize(scored(3000.0, softcap=20.0).module, FIXED)


def test_a_weight_too_large_for_the_ring_is_found_by_calibration() -> None:
    model = random_decoder("gpt2").float()
    model.transformer.h[1].mlp.c_proj.weight.data *= 1e12
    program = to_dialect(capture(model), CompileConfig())
    with pytest.raises(CompileError, match=r"transformer\.h\.1\.mlp"):
        legalize(program.graph_module, FIXED)


@pytest.mark.parametrize(
    ("family", "one_layer"), [("gpt2", {"n_layer": 1}), ("llama", {"num_hidden_layers": 1})]
)
def test_golden(family: str, one_layer: dict[str, int], golden: Golden) -> None:
    model = random_decoder(family, **one_layer).float()
    program = to_dialect(capture(model), CompileConfig())
    legalize(program.graph_module, FIXED)
    golden(f"{family}.ir", dump(program.graph_module, secret_only=True))
