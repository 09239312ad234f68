"""Writes what a trace depended on into its graph, as checks."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from mhc_compile.passes.trace_block import TracedBlock
from mhc_compile.runtime.guards import check_value, opened_check

_SIZES_AND_PARTS = frozenset({
    "size", "dim", "numel", "nelement", "stride", "chunk", "split", "split_with_sizes", "unbind",
    "tensor_split",
})  # fmt: skip


def add_guards(traced: TracedBlock) -> None:
    """Writes the guards into the graph.

    Those on modules and their attributes come first, then those that depend on inputs alone, so
    that another graph can be tried before anything has run; the rest is checked where the value
    appears. A size of an intermediate result is looked up early in an input that has the same one
    in the example, and checked again where it appears.
    """
    graph = traced.graph
    start = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    copies: dict[fx.Node, fx.Node] = {}

    def hoist(node: fx.Node) -> fx.Node:
        if node.op in ("placeholder", "get_attr"):
            return node
        if node not in copies:
            found = None if _inputs_suffice(node) else _size_of_input(node)
            with graph.inserting_before(start):
                if found is None:
                    mapping = {n: hoist(n) for n in node.all_input_nodes}
                    copies[node] = graph.node_copy(node, lambda n: mapping[n])
                else:
                    copies[node] = graph.call_method("size", found)
            copies[node].meta["guard"] = True
        return copies[node]

    _check_opened(traced)
    attributes = [guard for guard in traced.guards if guard[0].op == "get_attr"]
    others = [guard for guard in traced.guards if guard[0].op != "get_attr"]
    for node, value, source in [*attributes, *others]:
        early = _can_hoist(node)
        where = f"{source[0]}:{source[1]}" if source else "unknown source"
        if early:
            target = hoist(node)
            with graph.inserting_before(start):
                check = graph.call_function(check_value, (target, value, where, True))
            check.meta["guard"] = True
        if not _inputs_suffice(node):
            with graph.inserting_after(node):
                check = graph.call_function(check_value, (node, value, where, False))
            check.meta["guard"] = False
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


def _can_hoist(node: fx.Node) -> bool:
    """Whether a value follows from the inputs, or from sizes that are like those of inputs."""
    return _size_of_input(node) is not None or _follows(node, _can_hoist)


def _inputs_suffice(node: fx.Node) -> bool:
    """Whether a value can be computed from the inputs alone, before anything has run."""
    return _follows(node, _inputs_suffice)


def _follows(node: fx.Node, test: Callable[[fx.Node], bool]) -> bool:
    if node.meta.get("late") or node.meta.get("effect"):
        return False
    if node.op in ("placeholder", "get_attr"):
        return True
    if isinstance(node.meta.get("value"), Tensor) or not _is_plain(node):
        return False
    return all(test(n) for n in node.all_input_nodes)


def _is_plain(node: fx.Node) -> bool:
    """Whether running a node twice changes nothing and costs little."""
    if node.op != "call_method":
        return node.op == "call_function"
    owner = node.args[0]
    is_tensor = isinstance(owner, fx.Node) and isinstance(owner.meta.get("value"), Tensor)
    return is_tensor and node.target in _SIZES_AND_PARTS


def _size_of_input(node: fx.Node) -> tuple[fx.Node, int] | None:
    """An input and its dimension that in the example has the size which a node reads."""
    tensor: Any = node.args[0] if node.args else None
    index: Any = node.args[1] if len(node.args) == 2 else None
    if node.target is operator.getitem and isinstance(tensor, fx.Node):
        tensor = tensor.args[0] if tensor.target is getattr and tensor.args[1] == "shape" else None
    elif node.target is len:
        index = 0
    elif node.target != "size":
        return None
    value = tensor.meta.get("value") if isinstance(tensor, fx.Node) else None
    if not isinstance(index, int) or not isinstance(value, Tensor):
        return None
    at = index % value.dim()
    todo, seen = [tensor], set()
    while todo:
        source = todo.pop(0)
        if source.op == "placeholder" and isinstance(source.meta.get("value"), Tensor):
            shape = source.meta["value"].shape
            if at < len(shape) and shape[at] == value.shape[at]:
                return source, at
            if value.shape[at] in shape:
                return source, shape.index(value.shape[at])
        todo += [n for n in source.all_input_nodes if n not in seen]
        seen.update(todo)
    return None
