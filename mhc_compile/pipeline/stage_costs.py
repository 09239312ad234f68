"""What each block of a model costs, for balancing the stages of a pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from mhc_compile._torch_compat import tensor_leaves
from mhc_compile.errors import ConfigError, check_choice
from mhc_compile.passes.call_paths import named_leaves
from mhc_compile.passes.example_inputs import Inputs
from mhc_compile.passes.undo import rehearsed
from mhc_compile.pipeline.trace_model import TracedModel

COSTS = ("parameters", "time")
_REPEATS = 3


def block_costs(
    model: nn.Module, traced: TracedModel, inputs: Inputs, costs: str | Sequence[float]
) -> tuple[list[float], float, float]:
    """Returns the cost of each block call, of what comes before the first and behind the last.

    Raises:
        ConfigError: `costs` is an unknown name or has another length than there are blocks.
    """
    if not isinstance(costs, str):
        values = [float(cost) for cost in costs]
        if len(values) != len(traced.calls):
            raise ConfigError(
                f"costs must be one number for each of the {len(traced.calls)} blocks, got "
                f"{len(values)}"
            )
        return values, 0.0, 0.0
    check_choice("costs", costs, COSTS)
    if costs == "parameters":
        return _sums(model, traced, {n: _parameters(model, n) for n in traced.graph.nodes})
    result: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        result[0] = _sums(model, traced, _times(model, inputs, traced))
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def _sums(
    model: nn.Module, traced: TracedModel, costs: dict[fx.Node, float]
) -> tuple[list[float], float, float]:
    """What lies between two block calls counts to the earlier one."""
    sums, position = [0.0] * (len(traced.calls) + 1), 0
    for node in traced.graph.nodes:
        position += position < len(traced.calls) and node is traced.calls[position]
        sums[position] += costs.get(node, 0.0)
    first, blocks = sums[0], sums[1:]
    return blocks, first, 0.0


def _parameters(model: nn.Module, node: fx.Node) -> float:
    if node.op != "call_module":
        return 0.0
    modules = model.get_submodule(str(node.target)).modules()
    return float(sum(
        p.numel() for m in modules if not isinstance(m, nn.Embedding)
        for p in m.parameters(recurse=False)
    ))  # fmt: skip


def _times(model: nn.Module, inputs: Inputs, traced: TracedModel) -> dict[fx.Node, float]:
    """Seconds that a forward and a backward of each module take, the least of some repeats."""
    given = dict(named_leaves(type(model).forward, *inputs))
    clock = _Clock(model, traced.graph)
    with rehearsed(model):
        for _ in range(_REPEATS):
            clock.run(*(given[path] for path in traced.inputs))
    return clock.seconds


class _Clock(fx.Interpreter):
    """Runs a graph and notes how long its module calls take."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.seconds: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node; a module also backward."""
        if n.op != "call_module":
            return super().run_node(n)
        args, kwargs = fx.node.map_aggregate(self.fetch_args_kwargs_from_env(n), _leaf)  # type: ignore[misc]
        module = self.fetch_attr(str(n.target))
        _synchronize()
        start = time.perf_counter()
        with torch.enable_grad():
            result = module(*args, **kwargs)
            ends = [t for t in tensor_leaves(result) if t.requires_grad]
            starts = [*tensor_leaves((args, kwargs)), *module.parameters()]
            starts = [t for t in starts if t.requires_grad]
            if ends and starts:
                torch.autograd.grad(ends, starts, [torch.ones_like(t) for t in ends],
                                    allow_unused=True)  # fmt: skip
        _synchronize()
        taken = time.perf_counter() - start
        self.seconds[n] = min(self.seconds.get(n, taken), taken)
        return (
            fx.node.map_aggregate(result, _leaf)
            if isinstance(result, tuple | list)
            else _leaf(result)
        )


def _leaf(value: Any) -> Any:
    """A tensor without its history, which learns if it can."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.is_floating_point())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
