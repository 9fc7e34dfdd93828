"""One self-contained page of an inspection: graphs, costs, and what each pass changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import DictLoader, Environment, StrictUndefined

from mergec.compiler.backend.cost import CostReport
from mergec.compiler.report.graph_view import GraphView, operands
from mergec.compiler.report.inspect import Inspection
from mergec.compiler.report.layout import Layout, layered
from mergec.compiler.report.text import instruction_text, readable, shape_text
from mergec.compiler.text import layer_of
from mergec.runtime.core.op import Kind
from mergec.runtime.core.spec import Cost, Vis
from mergec.runtime.ops import load_all
from mergec.runtime.program.program import InputSpec, Instruction, RoleProgram, needed, phase_of

if TYPE_CHECKING:
    from mergec.compiler.report.history import Change
    from mergec.runtime.engine.audit_report import Audit

COLUMN, ROW = 190, 62
"""Distances between the centres of nodes in a layer, in pixels."""

_ATEN_KINDS = {
    Kind.LINEAR: ("linear", "matmul", "mm", "bmm", "addmm", "embedding", "baddbmm"),
    Kind.ATTENTION: ("scaled_dot_product_attention", "softmax"),
    Kind.NORM: ("rms_norm", "layer_norm", "native_layer_norm", "rsqrt", "mean", "square", "pow"),
    Kind.ACTIVATION: ("gelu", "silu", "relu", "tanh", "sigmoid", "exp", "reciprocal", "sqrt"),
    Kind.ARITHMETIC: ("add", "sub", "mul", "div", "neg", "sum"),
}
"""Kinds of torch's own ops; all others move data. An op of the dialect states its own kind."""

_KIND_OF = {op: kind for kind, ops in _ATEN_KINDS.items() for op in ops}


@dataclass
class _Group:
    """A layer, or a run of nodes outside of layers: its nodes, and the values that enter it.

    key: a unique name, as several runs may belong to one module. index: numbers of nodes by name.
    links: from node to node, by number.
    """

    module: str
    key: str
    nodes: list[dict[str, Any]] = field(default_factory=list)
    index: dict[str, int] = field(default_factory=dict)
    links: list[tuple[int, int]] = field(default_factory=list)


def page(
    inspection: Inspection,
    report: CostReport,
    after: GraphView,
    before: GraphView | None = None,
    changes: Sequence[Change] = (),
    audit: Audit | None = None,
) -> str:
    """The page as HTML. Without `before` it shows only the graph that the parties run; without
    `audit` it has no section on what each role sees.
    """
    costs = {row.name: row.cost for row in report.rows}
    marks = {name: {"critical": True} for name in report.critical_path}
    marks |= {name: {"idle": True} for name in _idle(after.program, report)}
    shapes: list[Layout] = []
    graphs = [_graph("after", "As the parties run it", after, shapes, costs, marks)]
    if before is not None:
        graphs.insert(0, _graph("before", "As captured", before, shapes, {}, {}))
    baseline = next((row for row in inspection.passes if row.without is not None), None)
    folder = files("mergec.compiler.report")
    names = ("page.html", "page.css", "page.js")
    sources = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "readable": readable,
        "kind": _kind,
    }
    return environment.get_template("page.html").render(
        inspection=inspection,
        audit=audit,
        baseline=baseline.without if baseline is not None else None,
        changes={change.name: change for change in changes},
        data={
            "graphs": graphs,
            "layouts": [_encode(shape) for shape in shapes],
            "kinds": [kind.value for kind in Kind],
        },
        peaks={
            key: max([1, *(getattr(row, key) for row in inspection.by_op)])
            for key in ("rounds", "online", "offline")
        },
        layer_peaks={
            key: max([1, *(getattr(row, key) for row in inspection.by_layer)])
            for key in ("rounds", "online", "offline")
        },
    )


def _idle(program: RoleProgram, report: CostReport) -> set[str]:
    """Names of instructions that this step does not run; only programs with phases have any."""
    names = {item.name for item in program.instructions}
    phase = program.phase(phase_of(report.new, report.past))
    defined = [(item.name, operands(item)) for item in program.instructions]
    run = needed(defined, {spec.name for spec in phase.inputs}, phase.outputs)
    return names - {defined[index][0] for index in run} if program.phases else set()


def _graph(
    name: str,
    title: str,
    view: GraphView,
    shapes: list[Layout],
    costs: Mapping[str, Cost],
    marks: Mapping[str, dict[str, bool]],
) -> dict[str, Any]:
    """The data that the page's script draws: groups of nodes, each with the number of its layout.

    Values that all parties know, such as masks and lengths, are left out. So are checks, whose
    values nobody uses.
    """
    groups, place = _groups(view, costs, marks)
    links = {
        (place[source], place[item.name])
        for item in view.program.instructions
        for source in operands(item)
        if source in place and item.name in place and place[source] != place[item.name]
    }
    encoded = []
    for group in groups:
        shape = layered(len(group.nodes), group.links, COLUMN, ROW)
        if shape not in shapes:
            shapes.append(shape)
        number = shapes.index(shape)
        encoded.append(
            {"key": group.key, "module": group.module, "nodes": group.nodes, "layout": number}
        )
    return {
        "name": name, "title": title, "groups": encoded, "links": sorted(links),
        "hidden": len(view.program.instructions) - len(place),
    }  # fmt: skip


def _groups(
    view: GraphView, costs: Mapping[str, Cost], marks: Mapping[str, dict[str, bool]]
) -> tuple[list[_Group], dict[str, int]]:
    """Groups in order, and the number of the group in which each value is computed."""
    program = view.program
    groups: list[_Group] = []
    layers: dict[str, int] = {}
    place: dict[str, int] = {}
    inputs = {spec.name: spec for spec in program.inputs}
    taken = {name for item in program.instructions for name in operands(item)}
    taken |= set(program.outputs)
    for item, path_in_model in _with_modules(program.instructions):
        if item.vis is Vis.PUBLIC or item.name not in taken:
            continue
        module = layer_of(path_in_model)
        if module.rpartition(".")[2].isdecimal() and module in layers:
            number = layers[module]
        elif groups and groups[-1].module == module:
            number = len(groups) - 1
        else:
            number = len(groups)
            again = sum(group.module == module for group in groups)
            groups.append(_Group(module, f"{module} ({again + 1})" if again else module))
            layers.setdefault(module, number)
        group = groups[number]
        node = _node(item, view, costs.get(item.name, Cost()))
        target = _add(group, node | marks.get(item.name, {}))
        place[item.name] = number
        for source in dict.fromkeys(operands(item)):
            if source not in group.index:
                if source in inputs:
                    _add(group, _input(inputs[source]))
                elif source in place:
                    _add(group, {"name": source, "op": "from", "kind": "port"})
                else:
                    continue
            link = (group.index[source], target)
            if link not in group.links:
                group.links.append(link)
    return groups, place


def _with_modules(instructions: Sequence[Instruction]) -> list[tuple[Instruction, str]]:
    """Instructions and their modules; one without a module is moved right before its first user."""
    result: list[tuple[Instruction, str]] = []
    waiting: dict[str, Instruction] = {}

    def put(item: Instruction, module: str) -> None:
        for name in operands(item):
            if name in waiting:
                put(waiting.pop(name), module)
        result.append((item, module))

    for item in instructions:
        if item.module:
            put(item, item.module)
        else:
            waiting[item.name] = item
    return [*result, *((item, "") for item in waiting.values())]


def _add(group: _Group, node: dict[str, Any]) -> int:
    group.index[node["name"]] = len(group.nodes)
    group.nodes.append(node)
    return group.index[node["name"]]


def _input(spec: InputSpec) -> dict[str, Any]:
    shape = shape_text(spec.shape)
    return {
        "name": spec.name, "op": "input", "kind": "port", "vis": spec.vis.value, "shape": shape,
        "text": f"%{spec.name} = input : {spec.vis.value} {shape}",
    }  # fmt: skip


def _node(item: Instruction, view: GraphView, cost: Cost) -> dict[str, Any]:
    op = item.target.split(".")[1]
    known = view.types.get(item.name)
    shape = shape_text(known.shape) if known is not None else ""
    node = {
        "name": item.name, "op": op, "kind": _kind(item.target),
        "vis": item.vis.value, "shape": shape, "module": item.module, "source": item.source,
        "text": f"{instruction_text(item)} {shape}".rstrip(),
        "rounds": cost.rounds, "online": cost.online, "offline": cost.offline,
    }  # fmt: skip
    return {key: value for key, value in node.items() if value not in ("", 0)}


def _kind(target: str) -> str:
    """The kind of the op behind an instruction's target, such as `mpc.gelu`."""
    space, op = target.split(".")[:2]
    known = load_all().get(op) if space == "mpc" else None
    kind = known.kind if known else _KIND_OF.get(op.strip("_"), Kind.MOVEMENT)
    return kind.value


def _encode(layout: Layout) -> dict[str, Any]:
    """A layout in whole pixels; the centres are one flat list, and so is the path of each edge."""

    def flat(points: Sequence[tuple[float, float]]) -> list[int]:
        return [round(number) for point in points for number in point]

    return {
        "width": round(layout.width), "height": round(layout.height),
        "places": flat(layout.places), "paths": [flat(path) for path in layout.paths],
    }  # fmt: skip
