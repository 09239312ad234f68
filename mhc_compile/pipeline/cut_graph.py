"""Step 2 of a split, cut: one graph per stage from the graph of the whole model.

A node belongs to the stage in which it ran. What a later stage reads of an earlier one is, in this
order: a constant if only sizes decide it, since a pipeline's microbatches have one shape, or, with
a check in the earlier stage, if it is a number; computed again if the inputs decide it (masks,
positions); else sent, from stage to stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx

from mhc_compile.errors import SplitError
from mhc_compile.passes.plan import format_source
from mhc_compile.pipeline.trace_model import TracedModel

_SHAPE_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
_SHAPE_METHODS = frozenset({"size", "dim", "numel", "nelement", "stride", "element_size"})
_RANDOM = ("dropout", "rand", "bernoulli", "multinomial", "normal", "exponential", "uniform")
_NUMBERS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size)


def check_same(value: Any, expected: Any, where: str) -> None:
    """Raises if the inputs take another way through the model's Python than the example did."""
    same = bool(value) == expected if isinstance(value, Tensor) else value == expected
    if not same:
        raise SplitError(
            f"the code at {where} saw {expected!r} on the example inputs of split_stages and "
            f"{'something else' if isinstance(value, Tensor) else repr(value)} now, so these "
            "inputs need other stages; split with example inputs of their kind (e.g. with padding)"
        )


def border(value: Tensor) -> Tensor:
    """A stage's result as a message: in one piece of memory."""
    return value.contiguous()


def handed_on(value: Tensor) -> Tensor:
    """What a stage got and hands on: a tensor of its own, with an edge for its gradient."""
    return value.clone()


@dataclass
class StageGraph:
    """The graph of one stage.

    Attributes:
        graph: its placeholders are what it receives, then the model's inputs that it reads.
        received: what it receives, nodes of the model's graph.
        inputs: names of the model's inputs that it reads.
    """

    graph: fx.Graph
    received: list[fx.Node]
    inputs: tuple[str, ...]


@dataclass
class Cut:
    """The model's graph with the stage of each node, while stages are made of it."""

    traced: TracedModel
    stage: dict[fx.Node, int]
    fixed: dict[fx.Node, bool] = field(default_factory=dict)
    repeatable: dict[fx.Node, bool] = field(default_factory=dict)
    numbers: dict[fx.Node, tuple[Any, str]] = field(default_factory=dict)


def cut_graph(
    traced: TracedModel, sizes: tuple[int, ...], wrap: Callable[..., Any] | None = None
) -> tuple[list[StageGraph], StageGraph]:
    """Makes the graph of each stage, and one that checks the inputs.

    What the root's Python saw of the inputs' values is checked apart: code that only looks at
    values, such as whether a mask is all ones, would break up compiled stages.

    Args:
        traced: the whole model.
        sizes: how many block calls each stage gets.
        wrap: what calls a block, `wrap(block, *args, **kwargs)`; None calls it as it is.

    Raises:
        SplitError: what crosses a border is neither a tensor nor follows from the inputs.
    """
    cut = Cut(traced, _assign(traced, sizes))
    for node in traced.graph.nodes:
        cut.fixed[node] = _is_fixed(cut, node)
        cut.repeatable[node] = _is_repeatable(cut, node)
    graphs: list[StageGraph] = []
    output = next(n for n in reversed(traced.graph.nodes) if n.op == "output")
    needed: list[fx.Node] = list(output.all_input_nodes)
    for node in needed:
        if not isinstance(_value(node), Tensor):
            raise SplitError(
                f"the model returns a {_kind(node)}, and the last stage can only "
                "return tensors; leave it out of the result (a cache: use_cache=False among the "
                "example inputs)"
            )
    for number in reversed(range(len(sizes))):
        last = number == len(sizes) - 1
        graphs.append(_stage_graph(cut, number, needed, wrap, last=last))
        needed = graphs[-1].received
    if needed:
        raise _refusal(needed[0], "the first stage would have to receive it")
    checks = {n: check for n, check in _checks(cut).items() if cut.repeatable[n]}
    return graphs[::-1], _build(cut, -1, [], checks, None)


def _assign(traced: TracedModel, sizes: tuple[int, ...]) -> dict[fx.Node, int]:
    """The stage in which each node ran; what looks at a tuple belongs to where that was made."""
    ends, total = set(), 0
    for size in sizes[:-1]:
        total += size
        ends.add(traced.calls[total - 1])
    stage: dict[fx.Node, int] = {}
    current = 0
    for node in traced.graph.nodes:
        sources = node.all_input_nodes
        looks = node.op == "call_function" and len(sources) == 1 and not node.meta.get("effect")
        made = looks and sources[0].op not in ("placeholder", "get_attr")
        inside = made and not isinstance(_value(sources[0]), Tensor)
        stage[node] = stage[sources[0]] if inside else current
        current += node in ends
    return stage


def _value(node: Any) -> Any:
    return node.meta.get("value") if isinstance(node, fx.Node) else node


def _is_fixed(cut: Cut, node: fx.Node) -> bool:
    """Whether a node's value is no tensor and follows from the sizes of tensors alone."""
    if isinstance(_value(node), Tensor) or node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.meta.get("effect") or node.op == "call_module":
        return False
    owner = node.args[0] if node.args else None
    if isinstance(_value(owner), Tensor):
        by_name = node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
        return by_name or (node.op == "call_method" and node.target in _SHAPE_METHODS)
    return bool(node.all_input_nodes) and all(cut.fixed[n] for n in node.all_input_nodes)


def _is_repeatable(cut: Cut, node: fx.Node) -> bool:
    """Whether a stage may compute a value anew: the inputs decide it and no weight does."""
    if node.op == "placeholder" or cut.fixed[node]:
        return True
    if node.op == "get_attr":
        return not isinstance(_value(node), torch.nn.Parameter)
    if node.op not in ("call_function", "call_method"):
        return False
    if node.meta.get("in_place") or node.meta.get("effect") and not _is_function(node.target):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    if any(word in name for word in _RANDOM):
        return False
    return all(cut.repeatable[n] for n in node.all_input_nodes)


def _is_function(target: Any) -> bool:
    """Whether a call that the trace could not look into is one of a model's own functions.

    Such a function, which branches on values, is taken to do nothing but return its result.
    """
    module = getattr(target, "__module__", None) or ""
    return isinstance(target, FunctionType) and not module.startswith("mhc_compile.")


def _checks(cut: Cut) -> dict[fx.Node, tuple[Any, str]]:
    """The guards on what may be another value for other inputs or weights."""
    varies: dict[fx.Node, bool] = {}
    for node in cut.traced.graph.nodes:
        varies[node] = not cut.fixed[node] and (
            node.op in ("placeholder", "call_module") or any(map(varies.get, node.all_input_nodes))
        )
    return {node: (value, where) for node, value, where in cut.traced.guards if varies[node]}


def _stage_graph(
    cut: Cut,
    number: int,
    needed: list[fx.Node],
    wrap: Callable[..., Any] | None,
    *,
    last: bool,
) -> StageGraph:
    """The graph of one stage: `needed` is what it has to hand on or, as the last, to return."""
    checks = {
        n: check for n, check in _checks(cut).items()
        if cut.stage[n] == number and not cut.repeatable[n]
    }  # fmt: skip
    checks |= {n: check for n, check in cut.numbers.items() if cut.stage[n] == number}
    effects = [
        n for n in cut.traced.graph.nodes if cut.stage[n] == number
        and (n.meta.get("effect") or n.meta.get("in_place")) and not cut.repeatable[n]
    ]  # fmt: skip
    return _build(cut, number, needed, checks, wrap, effects, last=last)


def _build(
    cut: Cut,
    number: int,
    needed: list[fx.Node],
    checks: dict[fx.Node, tuple[Any, str]],
    wrap: Callable[..., Any] | None,
    effects: Sequence[fx.Node] = (),
    last: bool = False,
) -> StageGraph:
    """Copies what `needed`, `effects` and `checks` take; stage -1 receives nothing."""
    live = _live(cut, number, [*needed, *effects, *checks])
    received = [n for n in live if _is_received(cut, number, n)]
    for node in received:
        if not isinstance(_value(node), Tensor):
            if "value" not in node.meta or not isinstance(node.meta["value"], _NUMBERS):
                raise _refusal(node, f"it is a {_kind(node)}, not a tensor")
            cut.numbers[node] = node.meta["value"], format_source(node.meta.get("source"))
    received = [n for n in received if n not in cut.numbers]
    live = [n for n in live if n not in cut.numbers or cut.stage[n] >= number]
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {
        n: graph.placeholder(f"received_{k}") for k, n in enumerate(received)
    }
    made |= {n: graph.placeholder(str(n.target)) for n in live if n.op == "placeholder"}
    for node in live:
        if node not in made:
            made[node] = _copy(cut, graph, node, made, wrap)
        if node in checks:
            graph.call_function(check_same, (made[node], *checks[node]))
    leaves = [made[n] for n in needed] if last else [
        graph.call_function(handed_on if n in received else border, (made[n],)) for n in needed
    ]  # fmt: skip
    graph.output(tuple(leaves))
    inputs = tuple(str(n.target) for n in live if n.op == "placeholder")
    return StageGraph(graph, received, inputs)


def _live(cut: Cut, number: int, roots: list[fx.Node]) -> list[fx.Node]:
    """What a stage computes or gets for `roots`, in the model's order."""
    found: set[fx.Node] = set()
    todo = [n for n in roots if not cut.fixed[n]]
    while todo:
        node = todo.pop()
        if node in found:
            continue
        found.add(node)
        if not _is_received(cut, number, node):
            todo += [n for n in node.all_input_nodes if not cut.fixed[n]]
    return [n for n in cut.traced.graph.nodes if n in found]


def _kind(node: fx.Node) -> str:
    if "value" in node.meta:
        return type(node.meta["value"]).__name__
    return str(getattr(node.target, "__name__", node.target))


def _is_received(cut: Cut, number: int, node: fx.Node) -> bool:
    earlier = cut.stage[node] < number and node.op not in ("placeholder", "get_attr")
    return earlier and not cut.repeatable[node]


def _copy(cut: Cut, graph: fx.Graph, node: fx.Node, made: dict[fx.Node, Any], wrap: Any) -> fx.Node:
    def argument(n: fx.Node) -> Any:
        return made[n] if n in made else _constant(cut, n)

    if wrap is not None and node in cut.traced.calls:
        block = graph.get_attr(str(node.target))
        args = fx.node.map_arg(node.args, argument)
        return graph.call_function(wrap, (block, *args), fx.node.map_arg(node.kwargs, argument))
    copied = graph.create_node(
        node.op, node.target, fx.node.map_arg(node.args, argument),
        fx.node.map_arg(node.kwargs, argument),
    )  # fmt: skip
    copied.meta["source"] = node.meta.get("source")
    return copied


def _constant(cut: Cut, node: fx.Node) -> Any:
    """The value that a node which only sizes decide had on the example."""
    if "value" in node.meta and isinstance(node.meta["value"], _NUMBERS):
        return node.meta["value"]

    def argument(n: fx.Node) -> Any:
        return n.meta["value"] if isinstance(_value(n), Tensor) else _constant(cut, n)

    if not cut.fixed[node]:
        raise _refusal(node, "its value is no number")
    args: Any = fx.node.map_arg(node.args, argument)
    kwargs: Any = fx.node.map_arg(node.kwargs, argument)
    if isinstance(node.target, str):
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def _refusal(node: fx.Node, why: str) -> SplitError:
    return SplitError(
        f"{node.name!r} at {format_source(node.meta.get('source'))} is needed behind a border of "
        f"stages, but {why}; cut at other blocks with split=[...], or compute it from the inputs"
    )
