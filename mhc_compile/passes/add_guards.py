"""Writes what a trace depended on into its graph, as checks."""

from __future__ import annotations

from torch import Tensor, fx

from mhc_compile.passes.flow import ADDS
from mhc_compile.passes.trace_block import TracedBlock
from mhc_compile.runtime.guards import check_value, opened_check


def add_guards(traced: TracedBlock) -> None:
    """Writes the guards into the graph.

    Those on modules and their attributes come first, then those that depend on inputs alone, so
    that another graph can be tried before anything has run; the rest is checked where the value
    appears.
    """
    graph = traced.graph
    start = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    copies: dict[fx.Node, fx.Node] = {}

    def hoist(node: fx.Node) -> fx.Node:
        if node.op in ("placeholder", "get_attr"):
            return node
        if node not in copies:
            mapping = {n: hoist(_size_source(node, n)) for n in node.all_input_nodes}
            with graph.inserting_before(start):
                copies[node] = graph.node_copy(node, lambda n: mapping[n])
            copies[node].meta["guard"] = True
        return copies[node]

    _check_opened(traced)
    attributes = [guard for guard in traced.guards if guard[0].op == "get_attr"]
    others = [guard for guard in traced.guards if guard[0].op != "get_attr"]
    for node, value, source in [*attributes, *others]:
        early = _depends_on_sizes_only(node)
        target = hoist(node) if early else node
        where = f"{source[0]}:{source[1]}" if source else "unknown source"
        context = graph.inserting_before(start) if early else graph.inserting_after(node)
        with context:
            check = graph.call_function(check_value, (target, value, where, early))
        check.meta["guard"] = early
        if attributes and node is attributes[-1][0]:
            # What is inserted after the last input goes behind these checks; nothing reads it.
            with graph.inserting_before(start):
                graph.get_attr("training").meta["value"] = False


def _check_opened(traced: TracedBlock) -> None:
    """Checks that submodules which were traced into are still of the same class.

    Outer ones come first, and all before anything inside them is looked up: what has their name
    now, such as a linear layer whose LoRA was merged, may have no such attributes.
    """
    graph = traced.graph
    nodes = {n.target: n for n in graph.nodes if n.op == "get_attr"}
    position = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for name in sorted(traced.opened, key=lambda name: name.count(".")):
        kind, hooked, _ = traced.opened[name]
        position.append(nodes[name])
        with graph.inserting_after(nodes[name]):
            position = graph.call_function(opened_check(kind), (nodes[name], hooked, name))
        position.meta["effect"] = position.meta["guard"] = True


def _size_source(reader: fx.Node, node: fx.Node) -> fx.Node:
    """What to read a size from: behind residual adds, the input that has the same one."""
    if reader.target is not getattr or reader.args[1] != "shape":
        return node
    return _same_size(node)


def _same_size(node: fx.Node) -> fx.Node:
    value = node.meta.get("value")
    if node.op != "call_function" or not isinstance(value, Tensor):
        return node
    if getattr(node.target, "__name__", "") not in ADDS:
        return node
    for term in node.all_input_nodes:
        other = term.meta.get("value")
        if isinstance(other, Tensor) and other.shape == value.shape:
            source = _same_size(term)
            if source.op == "placeholder":
                return source
    return node


def _depends_on_sizes_only(node: fx.Node) -> bool:
    if node.meta.get("late") or node.meta.get("effect"):
        return False
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op != "call_function" or isinstance(node.meta.get("value"), Tensor):
        return False
    return all(_depends_on_sizes_only(_size_source(node, n)) for n in node.all_input_nodes)
