"""The static peak of a graph, counted by hand."""

import operator

import torch
from torch.fx import Graph

from mhc_compile.backend.static_memory import Lifetimes, static_peak

aten = torch.ops.aten


def graph_of(*calls):
    """A graph of one input of 100 floats; each call names its target, arguments and value."""
    graph = Graph()
    nodes = [graph.placeholder("x")]
    nodes[0].meta["val"] = torch.empty(100, device="meta")
    for target, places, value in calls:
        args = tuple(nodes[p] if isinstance(p, int) else p[0] for p in places)
        nodes.append(graph.call_function(target, args))
        nodes[-1].meta["val"] = value
    graph.output((nodes[-1],)).meta["val"] = (nodes[-1].meta["val"],)
    return graph, nodes


def floats(*shape):
    return torch.empty(shape, device="meta")


def test_lifetimes_and_views():
    graph, nodes = graph_of(
        (aten.mm.default, (0, 0), floats(50, 10)),  # 100 + 500, the input goes
        (aten.view.default, (1, ([500],)), floats(500)),
        (aten.exp.default, (2,), floats(500)),  # 500 + 500, the first goes with its view
        (aten.sum.default, (3,), floats()),
    )
    assert static_peak(graph) == (4 * 1000, nodes[3])


def test_several_results():
    graph, nodes = graph_of(
        (aten.var_mean.correction, (0,), (floats(70), floats(30))),
        (operator.getitem, (1, (1,)), floats(30)),  # the other result is gone
        (aten.mm.default, (2, 2), floats(60)),
    )
    assert static_peak(graph) == (4 * 200, nodes[1])


def test_the_peak_in_another_order():
    """Their operands are held until then, their results are not there yet."""
    graph, nodes = graph_of(
        (aten.mm.default, (0, 0), floats(30)),  # 100 + 30
        (aten.exp.default, (1,), floats(40)),  # 100 + 30 + 40: moved behind the next but one
        (aten.mm.default, (0, 0), floats(200)),  # 100 + 40 + 200, the input goes
        (aten.mm.default, (3, 3), floats(5)),
        (aten.mm.default, (2, 4), floats(1)),
    )
    lifetimes = Lifetimes(graph)
    assert lifetimes.peak == 4 * 340
    # 100 + 30 + 200; then 30 + 200 + 5, then 30 + 40 + 5
    assert lifetimes.stretch(nodes[2], nodes[4]) == nodes[2:5]
    assert lifetimes.peak_of([nodes[3], nodes[4], nodes[2]]) == 4 * 330
    assert lifetimes.peak_of([nodes[3], nodes[2]]) == 4 * 330
    assert lifetimes.peak_of([nodes[3], nodes[4], nodes[1], nodes[2]]) == 4 * 305
    # The input is held for it: 100 + 200 + 5; then 100 + 30 + 5


def test_fused_steps_are_not_stored():
    calls = (
        (aten.exp.default, (0,), floats(100)),
        (aten.view.default, (1, ([10, 10],)), floats(10, 10)),
        (aten.sum.dim_IntList, (2, ([0],)), floats(10)),
    )
    graph, nodes = graph_of(*calls)
    assert static_peak(graph) == (4 * 200, nodes[1])
    assert static_peak(graph, fused=True) == (4 * 110, nodes[3])


def test_parameters_do_not_count():
    graph, nodes = graph_of((aten.exp.default, (0,), floats(100)))
    nodes[0].target = "primals_1"
    assert static_peak(graph) == (4 * 100, nodes[1])
