"""A chunk's backward in two parts: the gradients of its inputs, later those of its weights.

Of the autograd graph, what leads to an input runs in the first part. A weight can wait if one
node of that path leads to it, and leads nowhere else: the node's incoming gradient is kept and the
rest runs in the second part. A function written in Python (the connections' operators, a compiled
stage) always computes all its gradients; those of its weights are taken in the first part, so that
nothing runs twice. So are those of a weight that is used in several places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


@dataclass
class WeightWork:
    """The second part: for each node, what it got and the weights that it leads to."""

    roots: dict[Node, list[nn.Parameter]] = field(default_factory=dict)
    gradients: dict[Node, Sequence[Tensor | None]] = field(default_factory=dict)

    def run(self) -> None:
        """Adds the gradients to the weights' `.grad` and frees the graph."""
        while self.roots:
            node, parameters = self.roots.popitem()
            edges = [(GradientEdge(node, k), gradient)
                     for k, gradient in enumerate(self.gradients.pop(node, ()))
                     if gradient is not None]  # fmt: skip
            if not edges:
                continue
            found = torch.autograd.grad(
                [edge for edge, _ in edges], parameters, [gradient for _, gradient in edges],
                allow_unused=True,
            )  # fmt: skip
            _accumulate(parameters, found)


def backward_inputs(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    inputs: Sequence[Any],
    parameters: Iterable[nn.Parameter],
) -> tuple[tuple[Tensor | None, ...], WeightWork]:
    """Computes the gradients of `inputs`, and of those weights that cannot wait.

    Args:
        outputs: results of the chunk, or its loss.
        gradients: of these; None is 1 for a scalar, nothing for other tensors.
        inputs: what the chunk got; those that are tensors and require gradients are answered.
        parameters: of the stage; gradients are added to `.grad`.

    Returns:
        A gradient or None for each input, and the rest of the work.
    """
    roots = [(o, g) for o, g in zip(outputs, gradients, strict=True)
             if o.requires_grad and (g is not None or o.dim() == 0)]  # fmt: skip
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    learning = [p for p in parameters if p.requires_grad]
    work, early = _divide([o for o, _ in roots], wanted, learning)
    handles = [node.register_prehook(_keep(work, node)) for node in work.roots]
    try:
        found = torch.autograd.grad(
            [o for o, _ in roots], [*wanted, *early], [g for _, g in roots],
            retain_graph=bool(work.roots), allow_unused=True,
        ) if roots and (wanted or early) else (None,) * (len(wanted) + len(early))  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    _accumulate(early, found[len(wanted) :])
    by_input = {id(t): g for t, g in zip(wanted, found, strict=False)}
    return tuple(by_input.get(id(t)) for t in inputs), work


def _keep(work: WeightWork, node: Node) -> Any:
    def hook(gradients: Sequence[Tensor | None]) -> None:
        work.gradients[node] = gradients

    return hook


def _accumulate(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient


def _divide(
    outputs: list[Tensor], inputs: list[Tensor], parameters: list[nn.Parameter]
) -> tuple[WeightWork, list[nn.Parameter]]:
    """Which weights wait, by the node that leads to them, and which do not."""
    parents = _parents([get_gradient_edge(o).node for o in outputs])
    path = _above({get_gradient_edge(t).node for t in inputs}, parents)
    work, early = WeightWork(), []
    for parameter in parameters:
        node = get_gradient_edge(parameter).node
        if node not in parents:
            continue
        while node not in path and len(parents[node]) == 1:
            (node,) = parents[node]
        if node in path and not isinstance(node, BackwardCFunction):
            work.roots.setdefault(node, []).append(parameter)
        else:
            early.append(parameter)
    return work, early


def _parents(roots: list[Node]) -> dict[Node, set[Node]]:
    """For each node of a graph, the nodes that hand it gradients."""
    parents: dict[Node, set[Node]] = {root: set() for root in roots}
    todo = list(parents)
    while todo:
        node = todo.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            if child not in parents:
                parents[child] = set()
                todo.append(child)
            parents[child].add(node)
    return parents


def _above(nodes: set[Node], parents: dict[Node, set[Node]]) -> set[Node]:
    """The nodes from which one of `nodes` can be reached, these included."""
    found, todo = set(), [n for n in nodes if n in parents]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += parents[node]
    return found
