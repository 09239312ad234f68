"""Writes the operators of mhc out as their formulas, in a graph of ATen calls after autograd."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Collection, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from mhc_compile._torch_compat import (
    fake_mode_of,
    inductor_decompositions,
    size_hint,
    statically_known_true,
)
from mhc_compile.backend import formulas
from mhc_compile.backend.chained_pass import ChainedPass, hash_of_sources
from mhc_compile.backend.graph_nodes import arguments, mhc_op
from mhc_compile.runtime.precision import autocast_off

KEPT = ("maps", "maps_backward")
"""The operators that stay as they are."""
PLAIN = ("expand_backward",)
"""Those for which there is no generated kernel: Inductor adds up the streams with what it adds to
them before, where a stream's first read and first seam meet."""
_SOURCES = (
    "backend/lower_operators.py", "backend/formulas.py", "backend/graph_nodes.py",
    "map_layout.py", "runtime/op_shapes.py", "runtime/ops.py", "runtime/fused_norm.py",
    "backend/recompute_inputs.py", "backend/static_memory.py", "backend/measure_sublayers.py",
)  # fmt: skip


class LowerOperators(ChainedPass):
    """The pass as Inductor runs it.

    Where generated kernels run the operators, it lowers the `PLAIN` ones alone (`lower` is false).
    In any case `first` gets the graph, and may change it. What lowering takes is added to
    `seconds`.
    """

    def __init__(
        self, lower: bool, before: Any, first: Callable[[Graph], None], seconds: dict[str, float]
    ) -> None:
        super().__init__(before)
        self.lower, self.first, self.seconds = lower, first, seconds

    def change(self, graph: Graph) -> None:
        """Lowers the operators of a forward or backward graph, in place."""
        self.first(graph)
        start = time.perf_counter()
        lower_operators(graph, inductor_decompositions(), None if self.lower else PLAIN)
        taken = time.perf_counter() - start
        self.seconds["lower_operators"] = self.seconds.get("lower_operators", 0.0) + taken

    def identity(self) -> Any:
        """The formulas, and what the operators return."""
        return hash_of_sources(*_SOURCES), self.lower


def lower_operators(
    graph: Graph, decompositions: Any = None, only: Collection[str] | None = None
) -> None:
    """Replaces each call of an mhc operator by the calls of its formula.

    Equal calls, as those of the blocks of a model, are traced once. `decompositions` tells which
    ATen operators are written out further, `only` which of mhc are; None is for all.
    """
    traced: dict[Hashable, GraphModule] = {}
    for node in list(graph.nodes):
        name = mhc_op(node)
        if name is None or name in KEPT or (only is not None and name not in only):
            continue
        args = arguments(node)
        key = name, tuple(_key_of(arg) for arg in args)
        if key not in traced:
            traced[key] = _trace(getattr(formulas, name), node, args, decompositions)
        _inline(graph, node, traced[key], args)


def _trace(
    formula: Callable[..., Any], node: Node, args: list[Any], decompositions: Any
) -> GraphModule:
    """The formula's ATen calls on the tensors and sizes among the arguments.

    Results lie in memory as the operator's, because what follows was traced with those.
    """
    promised = node.meta["val"]
    wanted = (promised,) if isinstance(promised, Tensor) else promised
    places = [k for k, arg in enumerate(args) if isinstance(arg, Node)]
    values = [args[k].meta["val"] for k in places]

    def call(*given: Any) -> tuple[Any, ...]:
        whole = list(args)
        for place, value in zip(places, given, strict=True):
            whole[place] = value
        out = formula(*whole)
        whole_out = out if isinstance(out, tuple) else (out,)
        return tuple(
            _laid_out_as(value, want) for value, want in zip(whole_out, wanted, strict=True)
        )

    tensors = [value for value in values if isinstance(value, Tensor)]
    with fake_mode_of(tensors), torch.no_grad(), autocast_off(tensors[0]):
        # Apart from each other: two nodes may share a fake tensor, and tracing goes by identity.
        apart = [
            v.new_empty_strided(v.shape, v.stride()) if isinstance(v, Tensor) else v for v in values
        ]
        return make_fx(call, decomposition_table=decompositions)(*apart)


def _laid_out_as(value: Tensor, wanted: Tensor) -> Tensor:
    """A value with the strides of a dense tensor of its shape."""
    strides = wanted.stride()
    if all(
        map(statically_known_true, (a == b for a, b in zip(value.stride(), strides, strict=True)))
    ):
        return value
    order = sorted(range(value.dim()), key=lambda k: (-size_hint(strides[k]), k))
    back = [order.index(k) for k in range(value.dim())]
    return value.permute(order).contiguous().permute(back)


def _inline(graph: Graph, node: Node, body: GraphModule, args: list[Any]) -> None:
    given = iter([arg for arg in args if isinstance(arg, Node)])
    copies: dict[Node, Any] = {}
    outputs: tuple[Any, ...] = ()
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(given)
            elif inner.op == "output":
                outputs = tuple(copies[out] for out in inner.args[0])
            else:
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
                for name in ("stack_trace", "nn_module_stack", "custom"):
                    if name in node.meta:
                        copies[inner].meta[name] = node.meta[name]
    if isinstance(node.meta.get("val"), Tensor):
        node.replace_all_uses_with(outputs[0])
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    graph.erase_node(node)


def _key_of(arg: Any) -> Hashable:
    """What tracing depends on."""
    value = arg.meta["val"] if isinstance(arg, Node) else arg
    if isinstance(value, Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return value.dtype, value.device, tuple(map(str, sizes)), value.dim()
    return type(arg).__name__, str(value)
