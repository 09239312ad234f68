"""Step 1 of a split, trace: the root forward of a transformed model, its blocks kept as calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mhc_compile._torch_compat import compiled_module
from mhc_compile.errors import NotTransformedError, SplitError
from mhc_compile.passes.call_paths import LeafPath
from mhc_compile.passes.example_inputs import Inputs
from mhc_compile.passes.install_blocks import rewritten_blocks
from mhc_compile.passes.surroundings import collapse_escaped, forget_runs
from mhc_compile.passes.trace_block import trace_block
from mhc_compile.passes.undo import rehearsed
from mhc_compile.runtime.guards import run_forward_hooks, run_pre_hooks


@dataclass
class TracedModel:
    """A model's root forward as a graph.

    Attributes:
        graph: calls of modules and functions; the values in each node's `meta["value"]`.
        inputs: the inputs' placeholders by their paths in the arguments, see `named_leaves`.
        kind: the class of what the model returns if that is a dataclass, of which the graph
            returns the fields.
        calls: the calls of rewritten blocks in execution order; a split cuts between them.
        guards: nodes on whose values the forward's Python depended, with these values and lines.
    """

    graph: fx.Graph
    inputs: dict[LeafPath, fx.Node]
    kind: type | None
    calls: list[fx.Node]
    guards: list[tuple[fx.Node, Any, str]]


def trace_model(model: nn.Module, inputs: Inputs) -> TracedModel:
    """Traces the root forward of a transformed model in the mode that it is in.

    Args:
        model: a transformed model.
        inputs: positional and keyword arguments of one microbatch.

    Raises:
        NotTransformedError: the model has no rewritten blocks.
        SplitError: its blocks are no calls in its forward, or hooks stand around them.
        TraceError: the forward does something that a graph cannot hold.
    """
    if compiled_module(model) is not None:
        raise SplitError(
            "the model is wrapped by torch.compile; split the model itself, then compile its "
            "stages: stages[k].compile(backend='mhc')"
        )
    blocks = rewritten_blocks(model)
    if not blocks:
        raise NotTransformedError(
            f"{type(model).__name__} has no mHC blocks; call mhc_compile.transform(model) first"
        )
    opened = {
        ".".join(parts[:k]) for parts in (name.split(".") for name in blocks)
        for k in range(1, len(parts))
    }  # fmt: skip
    for name in ("", *sorted(opened)):
        _check_module(name, model.get_submodule(name))
    _check_checkpointing(model)
    args, kwargs = inputs
    with rehearsed(model), torch.no_grad():
        model(*args, **kwargs)  # blocks trace a kind of call that is new to them
    traced = trace_block(model, type(model).forward, args, kwargs, frozenset(opened))
    if traced.writes:
        raise SplitError(
            f"{type(model).__name__} changes its argument {traced.writes[0].path[0]!r} (a cache?), "
            "which no stage can do for the others; leave it out of example_inputs"
        )
    for node in reversed(traced.graph.nodes):
        if node.target in (run_pre_hooks, run_forward_hooks):
            traced.graph.erase_node(node)
    calls = [n for n in traced.graph.nodes if n.op == "call_module" and n.target in blocks]
    missing = set(blocks) - {str(n.target) for n in calls}
    if missing:
        raise SplitError(
            f"block {min(missing)!r} is not called in the forward of {type(model).__name__} on "
            "the example inputs, so there is no border at it. If the root's own forward adds to "
            "the stream or computes on it, move that into modules; if it calls the block in "
            "torch.utils.checkpoint, call it directly and give recompute=True"
        )
    guards = [(n, v, f"{s[0]}:{s[1]}" if s else "") for n, v, s in traced.guards]
    return TracedModel(traced.graph, traced.inputs, traced.kind, calls, guards)


def _check_module(name: str, module: nn.Module) -> None:
    """Refuses what a call of the module does besides its forward."""
    what = f"{name!r} ({type(module).__name__})"
    ours = (collapse_escaped, forget_runs)
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(),
             *module._backward_hooks.values(), *module._backward_pre_hooks.values()]  # fmt: skip
    if any(hook not in ours for hook in hooks):
        raise SplitError(
            f"module {what} around the blocks has a hook, which would have to run on several "
            "ranks at once; remove it, or put it on a block or on another module inside"
        )
    if "forward" in module.__dict__:
        raise SplitError(
            f"module {what} has a forward of its own on the instance, as accelerate's hooks put "
            "there; remove it before the split"
        )


def _check_checkpointing(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            raise SplitError(
                f"gradient checkpointing is on in {name!r}: a split backward would recompute once "
                "more for every group of weights. Turn it off and give split_stages(..., "
                "recompute=True), which recomputes once"
            )
