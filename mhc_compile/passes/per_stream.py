"""Operations on the residual stream between two sublayers, made to work on n streams."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_compile.runtime.reference import stack_parts

_PER_ELEMENT = frozenset({
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach",
    "dropout", "clamp", "clip", "nan_to_num", "tanh", "neg", "alias",
})  # fmt: skip
_ARITHMETIC = frozenset({
    "add", "sub", "mul", "div", "truediv", "pow", "iadd", "isub", "imul", "itruediv", "add_",
    "sub_", "mul_", "div_", "multiply", "subtract", "divide", "where", "lerp", "addcmul",
    "maximum", "minimum",
})  # fmt: skip


def is_cast(block: nn.Module, node: fx.Node) -> bool:
    """Whether a node changes each element by itself, without other tensors."""
    if node.op == "call_module":
        return isinstance(block.get_submodule(str(node.target)), nn.Dropout | nn.Identity)
    return target_name(node) in _PER_ELEMENT and len(node.all_input_nodes) == 1


def reshapes(node: fx.Node) -> bool:
    """Whether a node of one input gives another shape than it got."""
    before, after = node.all_input_nodes[0].meta.get("value"), node.meta.get("value")
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.shape != after.shape
    return True


def is_per_stream(block: nn.Module, node: fx.Node) -> bool:
    """Whether applying a node to [..., n, C] is the same as applying it to each [..., C].

    Plain tensors in arithmetic count, since `lift_node` gives them an axis of streams.
    """
    if is_cast(block, node):
        return not reshapes(node)
    if target_name(node) in _ARITHMETIC and node.op != "call_module":
        return True
    return _agrees(block, node)


def lift_node(block: nn.Module, node: fx.Node, streams: set[fx.Node], n: int) -> fx.Node | None:
    """Makes a node work on n streams: as it is if it can, else on each stream by itself.

    Args:
        block: the owner of the graph.
        node: it reads at least one of `streams`.
        streams: nodes that hold n streams.
        n: how many.

    Returns:
        The node that holds the n-stream result, None if there is none.
    """
    sources = [n for n in node.all_input_nodes if n in streams]
    if isinstance(sources[0].meta.get("value"), tuple | list):
        return node  # a part of a tuple of n-stream tensors
    if is_per_stream(block, node):
        for other in list(node.all_input_nodes):
            value = other.meta.get("value")
            if other not in streams and isinstance(value, Tensor) and value.dim() > 1:
                with node.graph.inserting_before(node):
                    axis = node.graph.call_method("unsqueeze", (other, -2))
                axis.meta["per_stream"] = True
                node.replace_input_with(other, axis)
        return node
    value = node.meta.get("value")
    parts = value if isinstance(value, tuple | list) else (value,)
    if node.meta.get("in_place") or not all(isinstance(v, Tensor) and v.dim() for v in parts):
        return None
    results = []
    graph = node.graph
    with graph.inserting_before(node):
        for k in range(n):
            single: dict[fx.Node, fx.Node] = {}
            for source in node.all_input_nodes:
                if source in streams:
                    one = graph.call_function(torch.select, (source, -2, k))
                    one.meta["per_stream"] = True
                    # A view of one stream need not exist: its rows lie n * C apart.
                    single[source] = graph.call_method("contiguous", (one,))
            results.append(graph.node_copy(node, partial(_replaced, single)))
        if isinstance(value, Tensor):
            stacked = graph.call_function(torch.stack, (results, -2))
        else:
            stacked = graph.call_function(stack_parts, (results,))
    stacked.meta.update({k: v for k, v in node.meta.items() if k in ("source", "value")})
    node.replace_all_uses_with(stacked)
    graph.erase_node(node)
    return stacked


def _replaced(changes: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    return changes.get(node, node)


def _agrees(block: nn.Module, node: fx.Node) -> bool:
    """Tries a function or norm on random streams, together and one by one."""
    sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
    value = sources[0].meta.get("value") if len(sources) == 1 else None
    if not isinstance(value, Tensor) or value.device.type == "meta" or not value.numel():
        return _is_known_norm(block, node)
    generator = torch.Generator().manual_seed(0)  # the user's random state stays as it is
    shape = (*value.shape[:-1], 3, value.shape[-1])
    streams = torch.randn(shape, generator=generator).to(value)
    try:
        with torch.random.fork_rng(devices=[]):
            together = _run(block, node, sources[0], streams.clone())
            single = [
                _run(block, node, sources[0], streams[..., i, :].contiguous()) for i in range(3)
            ]
            return bool(torch.allclose(together, torch.stack(single, -2), rtol=1e-3, atol=1e-4))
    except Exception:
        return False


def _run(block: nn.Module, node: fx.Node, source: fx.Node, x: Tensor) -> Any:
    args, kwargs = fx.map_arg(  # type: ignore[misc]
        (node.args, node.kwargs), lambda n: x if n is source else n.meta["value"]
    )
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        training = module.training
        module.eval()
        try:
            return module.forward(*args, **kwargs)
        finally:
            module.train(training)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_known_norm(block: nn.Module, node: fx.Node) -> bool:
    """Where nothing can be tried: torch's own norms over the last axis."""
    if node.op != "call_module":
        return False
    module = block.get_submodule(str(node.target))
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1


def target_name(node: fx.Node) -> str:
    """The name of a called function or method."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
