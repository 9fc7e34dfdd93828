"""Layered layout of a small graph: each node is above those that read its value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
from fast_sugiyama import from_edges

Point = tuple[float, float]

_BEND = 0.4
"""Width reserved for an edge that passes a layer, as a fraction of a node's."""


@dataclass(frozen=True)
class Layout:
    """Centres of nodes, and the points that each edge runs through, including its ends."""

    width: float
    height: float
    places: list[Point]
    paths: list[list[Point]]


def layered(count: int, edges: Sequence[tuple[int, int]], column: float, row: float) -> Layout:
    """Lay out nodes 0 to count - 1 with few crossings; nodes in a row are `column` apart.

    An edge (a, b) means that b is below a. Edges must be unique and free of cycles. Uses the method
    of Sugiyama, Tagawa and Toda (1981), as refined by Gansner et al. (1993).
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(edges)
    places: dict[int, Point] = {}
    paths: dict[tuple[int, int], list[Point]] = {}
    right = 0.0
    # One component at a time: with several, the library gives bends the numbers of nodes.
    for part in nx.weakly_connected_components(graph):
        nodes = sorted(part)
        inside = list(graph.subgraph(nodes).edges)
        found = _part(nodes, inside) if inside else ({nodes[0]: (0.0, 0.0)}, {})
        for node, (x, y) in found[0].items():
            places[node] = (right + x * column, y * row)
        for edge, points in found[1].items():
            paths[edge] = [(right + x * column, y * row) for x, y in points]
        bends = [x for edge in inside for x, _ in paths[edge]]
        right = max([*bends, *(places[node][0] for node in nodes)]) + column
    return Layout(
        width=max(right - column, 0.0),
        height=max((y for _, y in places.values()), default=0.0),
        places=[places[node] for node in range(count)],
        paths=[paths[edge] for edge in edges],
    )


def _part(
    nodes: Sequence[int], edges: Sequence[tuple[int, int]]
) -> tuple[dict[int, Point], dict[tuple[int, int], list[Point]]]:
    """Positions and paths of a connected graph, in columns and rows that start at 0."""
    number = {node: index for index, node in enumerate(nodes)}
    numbered = [(number[a], number[b]) for a, b in edges]
    ((found, _, _, links),) = from_edges(numbered, 1, 1.0, True, _BEND)
    # The library counts rows from the bottom, and numbers bends from len(nodes) on.
    top = max(y for _, (_, y) in found)
    left = min(x for _, (x, _) in found)
    at = {int(index): (x - left, top - y) for index, (x, y) in found}
    onward: dict[int, list[int]] = {}
    for a, b in links or ():
        onward.setdefault(int(a), []).append(int(b))
    paths = {}
    for index, node in enumerate(nodes):
        for following in onward.get(index, ()):
            chain = [index, following]
            while chain[-1] >= len(nodes):
                (bend,) = onward[chain[-1]]
                chain.append(bend)
            paths[node, nodes[chain[-1]]] = [at[stop] for stop in chain]
    return {node: at[index] for index, node in enumerate(nodes)}, paths
