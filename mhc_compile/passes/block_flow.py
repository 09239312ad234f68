"""The data flow of a traced block, in the form that `flow` analyses."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_compile.errors import UnsupportedResidualError
from mhc_compile.passes.containers import form_of
from mhc_compile.passes.flow import NOOPS as NOOP_NAMES
from mhc_compile.passes.flow import (
    Candidate,
    Flow,
    Op,
    find_candidates,
    is_heavy_name,
)
from mhc_compile.passes.plan import BlockPlan, format_source
from mhc_compile.passes.streams import link_streams, split_nested


def block_candidates(
    graph: fx.Graph, block: nn.Module, plan: BlockPlan, label: str
) -> tuple[Flow, list[fx.Node], list[Candidate]]:
    """Finds a plan's residual adds in the block's graph, by data flow and source line.

    Returns:
        The flow graph, its nodes by index, and one candidate a site, in order.

    Raises:
        UnsupportedResidualError: the graph does not hold exactly the recorded adds.
    """
    flow, nodes = _graph_flow(graph, block, plan)
    sources = set(plan.sources)
    found = list(find_candidates(flow, lambda op: op.source in sources).values())
    lines = [flow.ops[c.index].source for c in found]
    if lines != plan.sources:
        found = _other_way(flow)
        lines = [flow.ops[c.index].source for c in found]
    if len(found) != len(plan.sources):
        expected = ", ".join(format_source(s) for s in plan.sources)
        seen = ", ".join(format_source(s) for s in lines) or "none"
        raise UnsupportedResidualError(
            f"block {plan.name!r} ({label}) takes another way through its code than "
            f"in the recording: residual adds expected at {expected}, found at {seen}; pass "
            "example_inputs that are like the later calls, or leave the block out with filter_fn"
        )
    _check_no_more(flow, nodes, found, plan, label)
    return flow, nodes, found


def _check_no_more(
    flow: Flow, nodes: list[fx.Node], found: list[Candidate], plan: BlockPlan, label: str
) -> None:
    """Refuses adds on the same streams at lines that the recording did not reach."""
    known = {c.index for c in found}
    candidates = find_candidates(flow)
    chains, _ = link_streams(flow, candidates)
    for chain in split_nested(flow, candidates, chains)[0]:
        new = [i for i in chain if i not in known and flow.ops[i].source not in plan.seen]
        if new and not known.isdisjoint(chain):
            raise UnsupportedResidualError(
                f"block {plan.name!r} ({label}) has a residual add at "
                f"{format_source(nodes[new[0]].meta.get('source'))} that the recording in "
                "evaluation mode did not reach; make the block add the same residuals in training "
                "and evaluation, or leave it out with filter_fn"
            )


def _other_way(flow: Flow) -> list[Candidate]:
    """The adds of a block whose Python takes another branch than in the recording."""
    candidates = find_candidates(flow)
    chains, _ = link_streams(flow, candidates)
    accepted, _ = split_nested(flow, candidates, chains)
    return [candidates[i] for i in sorted(i for chain in accepted for i in chain)]


def _graph_flow(graph: fx.Graph, block: nn.Module, plan: BlockPlan) -> tuple[Flow, list[fx.Node]]:
    _note_tuples(graph)
    flow, nodes, index_of = Flow(), list(graph.nodes), {}
    for index, node in enumerate(nodes):
        index_of[node] = index
        value = node.meta.get("value")
        tensor = _carried(value)
        name = _name(node)
        operands = [n for n in _tensor_arguments(node)]
        heavy = is_heavy_name(name) or _is_opaque(node)
        noop = node.op in ("call_function", "call_method") and (
            name in NOOP_NAMES or _is_identity(node, name)
        )
        inputs = node.all_input_nodes
        is_fixed = bool(inputs) and all(flow.ops[index_of[n]].fixed for n in inputs)
        if node.op == "call_module":
            heavy = node.target not in plan.light
            noop = isinstance(block.get_submodule(str(node.target)), nn.Identity)
        flow.ops.append(Op(
            index, name,
            () if _is_size(value) else tuple(index_of[n] for n in _read_nodes(node, name)),
            tuple(None if _is_vector(n) else index_of[n] for n in operands),
            tuple(tuple(n.meta["value"].shape) for n in operands),
            tuple(tensor.shape) if tensor is not None else (),
            tensor is not None and tensor.is_floating_point(), heavy, noop,
            source=node.meta.get("source"), weights=_weights(node, block),
            fixed=node.op == "get_attr" or is_fixed,
        ))  # fmt: skip
        if node.op == "output":
            flow.outputs.add(index)
    flow.finish()
    return flow, nodes


def _note_tuples(graph: fx.Graph) -> None:
    """Gives nodes that return several tensors their values, which stand at the parts alone."""
    for node in graph.nodes:
        users = [u for u in node.users if u.target is not form_of]
        parts = [u.meta.get("value") for u in users if u.target is operator.getitem]
        if "value" not in node.meta and parts and len(parts) == len(users):
            if all(isinstance(part, Tensor) for part in parts):
                node.meta["value"] = tuple(parts)


def _carried(value: Any) -> Tensor | None:
    """The tensor that a node gives, of several (all floating-point) the first."""
    if isinstance(value, tuple | list) and value and not _is_size(value):
        if all(isinstance(v, Tensor) and v.is_floating_point() for v in value):
            return _carried(value[0])
    return value if isinstance(value, Tensor) else None


def _read_nodes(node: fx.Node, name: str) -> list[fx.Node]:
    """The inputs whose values, and not their sizes alone, a node reads."""
    if name in ("expand_as", "view_as", "reshape_as", "type_as"):
        return node.all_input_nodes[:1]
    if name.endswith("_like") or name.startswith("new_"):
        return []
    return node.all_input_nodes


def _weights(node: fx.Node, block: nn.Module) -> tuple[object, ...]:
    """What identifies the parameters that a node holds."""
    if node.op == "get_attr":
        return (node.target,) if isinstance(node.meta.get("value"), nn.Parameter) else ()
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        return (node.target,) if next(module.parameters(), None) is not None else ()
    return ()


def _is_opaque(node: fx.Node) -> bool:
    """Whether a node calls a function that was not traced, in which anything may happen."""
    module = getattr(node.target, "__module__", None) or "torch"
    known = module.split(".")[0] in ("torch", "operator", "_operator", "builtins", "math")
    checkpoint = getattr(node.target, "__name__", "") == "checkpoint"
    return node.op == "call_function" and (checkpoint or not known)


def _is_size(value: Any) -> bool:
    """Whether a value holds sizes alone: what depends on a tensor's sizes does not depend on it."""
    if isinstance(value, tuple | list):
        return bool(value) and all(map(_is_size, value))
    return isinstance(value, int | float | torch.dtype | torch.device)


def _is_identity(node: fx.Node, name: str) -> bool:
    """Whether 0 is added or 1 multiplied, as in a recording."""
    if name in ("sub", "div", "truediv"):
        other = node.args[1] if len(node.args) == 2 else None
        return isinstance(other, int | float) and other == (0 if name == "sub" else 1)
    neutral = {"add": 0, "mul": 1}.get(name)
    return neutral is not None and any(
        isinstance(a, int | float) and a == neutral for a in node.args
    )


def _is_vector(node: fx.Node) -> bool:
    """Whether a node is a number or vector among the parameters, which no stream can start from."""
    return node.op == "get_attr" and bool(node.meta["value"].dim() < 2)


def _name(node: fx.Node) -> str:
    if node.op not in ("call_function", "call_method"):
        return node.op
    if node.target is operator.getitem and _is_sequence(node.args[0]):
        return "part"  # one of several results, not a slice of a tensor
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "call")


def _is_sequence(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("value"), tuple | list)


def _tensor_arguments(node: fx.Node) -> list[fx.Node]:
    values: list[Any] = [*node.args, *(v for k, v in node.kwargs.items() if k not in ("out",))]
    return [v for v in values if isinstance(v, fx.Node) and isinstance(v.meta.get("value"), Tensor)]
