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

    Stages on one rank share the parameter itself, where autograd adds up. Ranks send their
    gradients to the lowest of them, which returns the sum, in the order of the parameters; groups
    of their own would make process groups whose names differ between ranks.

    Args:
        layout: which rank has which stage.
        stages: which parameters are shared.
        modules: this rank's stages.
        groups: the communicators for messages to higher and to lower ranks.

    Attributes:
        pairs: ranks that exchange something here, the lower one first.
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
        for names in stages.shared:
            holders = sorted({int(layout.rank_of(stage, 0)) for stage in names})
            self.pairs |= {(holders[0], other) for other in holders[1:]}
            here = [stage for stage in names if stage in modules]
            if here and len(holders) > 1:
                parameter = modules[here[0]].get_parameter(names[here[0]])
                self.mine.append((parameter, holders))

    def make_equal(self) -> None:
        """Gives all ranks the lowest one's values."""
        for parameter, holders in self.mine:
            self._hand_out(parameter.data, holders)

    def add_gradients(self) -> None:
        """Gives all ranks the sum of their gradients; one that has none counts as zero."""
        for parameter, holders in self.mine:
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

    def _hand_out(self, value: Tensor, holders: list[int]) -> None:
        if self.rank == holders[0]:
            for other in holders[1:]:
                dist.send(value, group=self.groups[0], group_dst=other)
        else:
            dist.recv(value, group=self.groups[0], group_src=holders[0])
