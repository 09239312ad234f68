"""What the passes ask of a graph that torch.compile captured: torch calls before autograd."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from mhc_compile._torch_compat import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    fake_mode_of,
)

HOISTED = ("add", "mul", "float", "to")
_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ipow, operator.imatmul, operator.ifloordiv, operator.imod, operator.iand,
    operator.ior, operator.ixor,
}  # fmt: skip


def mhc_op(node: Any) -> str | None:
    """The name of the mhc operator that a node calls, such as "read"; else None."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    name = getattr(target, "_qualified_op_name", "")
    return name.removeprefix("mhc::") if name.startswith("mhc::") else None


def is_expanded(node: Node) -> bool:
    """Whether a node makes n equal streams of one: by the operator, or as a view of stride 0."""
    if mhc_op(node) == "expand":
        return True
    value = value_of(node) if call_name(node) == "expand.default" else None
    return value is not None and value.dim() > 1 and value.stride(-2) == 0


def arguments(node: Node) -> list[Any]:
    """All arguments of a call of an mhc operator, in the order of its schema."""
    packet = getattr(torch.ops.mhc, str(mhc_op(node)))
    declared = packet.default._schema.arguments
    args = list(node.args)
    for argument in declared[len(args) :]:
        args.append(node.kwargs.get(argument.name, argument.default_value))
    return args


def call_name(node: Node) -> str:
    """The name of the function or method of a call: "add" for torch.add, x.add and +."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def value_of(node: Any) -> Tensor | None:
    """The fake tensor that a node computes."""
    value = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of what a node computes."""
    value = value_of(node)
    return None if value is None else value.dtype


def site_of(node: Node) -> str:
    """The name of the innermost module that a call was made in, as the model names it."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else node.name
    path = re.sub(r"getattr\((.+), '(\w+)'\)", r"\1.\2", path)
    path = re.sub(r"\['?(\w+)'?\]", r".\1", path)
    return path.removeprefix("L.self.").removeprefix("L.self") or path


def results(node: Node) -> dict[int, list[Node]] | None:
    """The nodes that take each result of a call with several; None if it is used otherwise."""
    taken: dict[int, list[Node]] = {}
    for user in node.users:
        if user.op != "call_function" or user.target is not operator.getitem:
            return None
        index = user.args[1]
        if not isinstance(index, int):
            return None
        taken.setdefault(index, []).append(user)
    return taken


def graphs(module: GraphModule) -> Iterator[Graph]:
    """The graph, and those of the bodies of its checkpoints and branches."""
    for part in module.modules():
        if isinstance(part, GraphModule):
            yield part.graph


def is_tangent(node: Node) -> bool:
    """Whether a node of a joint or backward graph is the gradient of one of its results."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def has_backward(graph: Graph) -> bool:
    """Whether a graph is a joint or a backward one."""
    return any(map(is_tangent, graph.nodes))


def joint_ends(joint: Graph) -> tuple[list[Node], list[Any], list[Any]]:
    """A joint graph's inputs, the forward's results, and each input's gradient or None."""
    inputs = [node for node in joint.find_nodes(op="placeholder") if not is_tangent(node)]
    results = tree_leaves(joint.output_node().args)
    forward = len(results) - len(inputs)
    return inputs, results[:forward], results[forward:]


def result(call: Node, index: int) -> Node | None:
    """The node that takes one of a call's several results, None without."""
    takers = (user for user in call.users if user.target is operator.getitem)
    return next((taker for taker in takers if taker.args[1] == index), None)


def fake_result(call: Node) -> Any:
    """What a call returns, as fake tensors of its own: memory is planned by their identity."""
    args, kwargs = map_arg((call.args, call.kwargs), lambda source: source.meta["val"])
    with fake_mode_of(args):
        return call.target(*args, **kwargs)  # type: ignore[operator]


def same_grad_mode(first: Node, last: Node) -> bool:
    """Whether no change of grad mode lies between two nodes."""
    return not any(map(_changes_grad_mode, _between(first, last)))


def written_between(value: Node, last: Node) -> bool:
    """Whether `value`, or what may share its memory, is changed in place before `last`."""
    reached = {value}
    for node in _between(value, last):
        if not any(source in reached for source in node.all_input_nodes):
            continue
        if writes(node):
            return True
        reached.add(node)
    return False


def readers_of_memory(value: Node) -> Iterator[Node]:
    """Whatever reads `value` or a view of it, the graph's output too; by their fake tensors."""
    memory = _storages(value)
    for node in value.graph.nodes:
        if node is value or memory & _storages(node):
            yield from node.users


def _storages(node: Node) -> set[int]:
    values = tree_leaves(node.meta.get("example_value", node.meta.get("val")))
    tensors = [v for v in values if isinstance(v, Tensor) and v.layout is torch.strided]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def can_stand_before(node: Any, anchor: Node) -> bool:
    """Whether a node's value is there at `anchor`, or can be computed there."""
    if not isinstance(node, Node) or node < anchor:
        return True
    if call_name(node) not in HOISTED or node.op not in ("call_function", "call_method"):
        return False
    return all(can_stand_before(source, anchor) for source in node.all_input_nodes)


def move_before(node: Any, anchor: Node) -> None:
    """Moves a node, and what it needs, as `can_stand_before` allows."""
    if not isinstance(node, Node) or node < anchor:
        return
    for source in node.all_input_nodes:
        move_before(source, anchor)
    anchor.prepend(node)


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node < last:
        yield node
        node = node.next


def _changes_grad_mode(node: Node) -> bool:
    name = call_name(node)
    return "grad_enabled" in name or "inference_mode" in name


def writes(node: Node) -> bool:
    """Whether a call may change one of its arguments in place."""
    if node.op == "call_module":
        return True
    target, name = node.target, call_name(node)
    if target in _IN_PLACE or node.kwargs.get("out") is not None:
        return True
    if name.startswith("__i") or (name.endswith("_") and not name.endswith("__")):
        return name not in ("__index__", "__invert__")
    if isinstance(target, HigherOrderOperator):
        return True
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, o)._schema.is_mutable for o in target.overloads())
    if isinstance(target, OpOverload):
        return target._schema.is_mutable
    return _asks_in_place(node)


def _asks_in_place(node: Node) -> bool:
    if node.op != "call_function" or "inplace" in node.kwargs:
        return bool(node.kwargs.get("inplace"))
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return bool(bound.arguments.get("inplace"))
