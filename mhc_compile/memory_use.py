"""What a recompute plan should need, what the graphs say that it needs, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile._torch_compat import tensor_leaves
from mhc_compile.backend.records import GraphRecord
from mhc_compile.runtime.eager_recompute import eager_recompute
from mhc_compile.runtime.memory_events import peak_bytes
from mhc_compile.scheduler.choose_plan import Choice
from mhc_compile.scheduler.recompute_plan import runs

HEADERS = ["plan of", "sublayers", "objective", "r*", "value", "L_r", "ties", "blocks",
           "boundaries", "F kept", "transient", "head", "gradients", "predicted"]  # fmt: skip
"""Of the table of plans; sizes are in MiB, at the moment of the peak."""
MIB = 2**20


@dataclass(frozen=True)
class MemoryUse:
    """Activations and gradients of one forward and backward.

    Attributes:
        plans: of each stream of each compiled graph, or of each stream in eager execution.
        static: of each compiled graph, the largest sum of its tensors at one time in bytes; None
            as long as no backward was compiled, and where it came from Inductor's cache.
        measured: the peak of the model on the example inputs in bytes, None where it was not run.
    """

    plans: tuple[tuple[str, Choice], ...]
    static: tuple[int | None, ...]
    measured: int | None

    @property
    def predicted(self) -> int | float | None:
        """The peak by the plan's model in bytes; None without a plan, or with several graphs."""
        peaks = [choice.memory.peak for _, choice in self.plans if choice.memory is not None]
        if not peaks or len(peaks) < len(self.plans) or len(self.static) > 1:
            return None
        return max(peaks)

    def rows(self) -> list[list[Any]]:
        """The table of plans."""
        rows = []
        for name, choice in self.plans:
            plan, parts = choice.plan, ["not seen: from Inductor's cache"]
            if choice.memory is not None:
                (s,) = choice.memory.stages
                sizes = (s.boundaries, s.kept, s.transient, s.head, s.gradients, s.peak)
                parts = [f"{size / MIB:.1f}" for size in sizes]
            rows.append(
                [name, sum(plan.block_sizes), plan.objective if plan.ties else "given",
                 plan.expression, f"{plan.continuous:.2f}", plan.block_size,
                 ", ".join(map(str, plan.ties)), runs(plan.block_sizes), *parts]
            )  # fmt: skip
        return rows

    def summary(self) -> str:
        """Predicted, static and measured peak side by side, with their gaps."""
        static = self.static[0] if len(self.static) == 1 else None
        parts = [
            f"predicted {_size(self.predicted)}",
            f"static {_size(static)}{_gap(static, self.predicted)}",
            f"measured {_size(self.measured)}{_gap(self.measured, self.predicted)}",
        ]
        return "Peak of activations and gradients: " + " | ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dict; what was not measured is None."""
        plans = [
            {
                "name": name,
                "plan": choice.plan.to_dict(),
                "memory": choice.memory.to_dict() if choice.memory else None,
            }
            for name, choice in self.plans
        ]
        figures = {"static": self.static, "measured": self.measured}
        return {"plans": plans, "predicted": self.predicted, **figures}


def memory_use(
    model: nn.Module, graphs: Sequence[GraphRecord], measured: int | None = None
) -> MemoryUse | None:
    """Collects the plans of a model's graphs, or those of `set_recompute` without any.

    Returns:
        None if there is neither a plan nor a figure.
    """
    plans = [
        (f"graph {number}, stream {stream}", choice)
        for number, graph in enumerate(graphs)
        for stream, choice in enumerate(graph.choices)
    ]
    hooks = eager_recompute(model)
    if not graphs and hooks is not None:
        plans = [(f"eager, stream {k}", choice) for k, choice in enumerate(hooks.choices)]
    static = tuple(graph.static_peak for graph in graphs)
    if not plans and measured is None and not any(static):
        return None
    return MemoryUse(tuple(plans), static, measured)


def peak_of(call: Callable[..., Any], model: nn.Module, args: Any, kwargs: Any) -> int:
    """The peak in bytes of one forward and backward, gradients included, which are put back.

    The backward starts from the loss among the results, or else from the sum of all of them. One
    more call comes first, which may compile or be looked at by a recompute plan.
    """
    parameters = list(model.parameters())
    device = parameters[0].device.type if parameters else "cpu"
    before = [p.grad for p in parameters]

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        result = call(*args, **kwargs)
        loss = getattr(result, "loss", None)
        parts = [loss] if isinstance(loss, Tensor) else tensor_leaves(result)
        with_gradient = [t.float().sum() for t in parts if t.requires_grad]
        sum(with_gradient[1:], with_gradient[0]).backward()

    try:
        with torch.enable_grad(), torch.random.fork_rng():
            step()
            return peak_bytes(step, device)
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad


def _size(value: float | None) -> str:
    return "not measured" if value is None else f"{value / MIB:.1f} MiB"


def _gap(value: float | None, predicted: float | None) -> str:
    if value is None or not predicted:
        return ""
    return f" ({100 * (value / predicted - 1):+.1f} %)"
