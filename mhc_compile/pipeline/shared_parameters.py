"""Parameters that stages on several ranks have, such as an embedding tied to the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from mhc_compile.pipeline.stages import PipelineStages
from mhc_compile.scheduler.layout import Layout


class SharedParameters:
    """Keeps tied parameters equal: one start for all, and the sum of all gradients.

    Stages on one rank get a parameter each, on the same memory: on CUDA they run on two streams,
    which must not add to one gradient at once. Ranks send their gradients to the lowest of them,
    which returns the sum, in the order of the parameters; groups of their own would make process
    groups whose names differ between ranks.

    Args:
        layout: which rank has which stage.
        stages: which parameters are shared.
        modules: this rank's stages.
        groups: the communicators for messages to higher and to lower ranks.

    Attributes:
        pairs: ranks that exchange something here, the lower one first.
        copies: for each further parameter on a rank, by itself, the first one.
    """

    def __init__(
        self,
        layout: Layout,
        stages: PipelineStages,
        modules: Mapping[int, fx.GraphModule],
        groups: tuple[Any, Any],
    ) -> None:
        self.groups, self.rank = groups, dist.get_rank(groups[0])
        self.mine: list[tuple[nn.Parameter, list[int]]] = []
        self.pairs: set[tuple[int, int]] = set()
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        self._earlier: list[Tensor | None] = []
        for names in stages.shared:
            holders = sorted({int(layout.rank_of(stage, 0)) for stage in names})
            self.pairs |= {(holders[0], other) for other in holders[1:]}
            here = [(modules[k], name) for k, name in names.items() if k in modules]
            if not here:
                continue
            first = here[0][0].get_parameter(here[0][1])
            if len(holders) > 1:
                self.mine.append((first, holders))
            for module, name in here[1:]:
                self.copies[_replace(module, name, first)] = first

    def make_equal(self) -> None:
        """Gives all ranks the lowest one's values."""
        for parameter, holders in self.mine:
            self._hand_out(parameter.data, holders)

    def begin(self) -> None:
        """Before a step: sets gradients of earlier steps aside, which are summed already."""
        self._earlier = [parameter.grad for parameter, _ in self.mine]
        for parameter in (*self.copies, *(parameter for parameter, _ in self.mine)):
            parameter.grad = None

    def add_gradients(self) -> None:
        """Gives all ranks the sum of their gradients; one that has none counts as zero."""
        for copy, first in self.copies.items():
            if copy.grad is not None:
                first.grad = copy.grad if first.grad is None else first.grad.add_(copy.grad)
        for (parameter, holders), earlier in zip(self.mine, self._earlier, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.rank == holders[0]:
                for other in holders[1:]:
                    part = torch.empty_like(parameter.grad)
                    dist.recv(part, group=self.groups[1], group_src=other)
                    parameter.grad += part
            else:
                dist.send(parameter.grad, group=self.groups[1], group_dst=holders[0])
            self._hand_out(parameter.grad, holders)
            if earlier is not None:
                parameter.grad += earlier
        for copy, first in self.copies.items():
            copy.grad = first.grad

    def _hand_out(self, value: Tensor, holders: list[int]) -> None:
        if self.rank == holders[0]:
            for other in holders[1:]:
                dist.send(value, group=self.groups[0], group_dst=other)
        else:
            dist.recv(value, group=self.groups[0], group_src=holders[0])


def _replace(module: fx.GraphModule, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """Puts a parameter of its own, on the memory of another one, at a place of a stage."""
    owner, _, last = name.rpartition(".")
    copy = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    setattr(module.get_submodule(owner), last, copy)
    return copy
