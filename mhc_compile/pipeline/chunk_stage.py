"""A stage for torch's pipeline runtime: fixed shapes, a communicator for each direction."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from mhc_compile.pipeline.split_backward import WeightWork, backward_inputs
from mhc_compile.pipeline.stages import PipelineStages


class ChunkStage(PipelineStage):
    """One of a rank's stages; it runs a chunk at a time.

    What a chunk receives gets its memory when the receive is posted and loses it after the
    backward, so that a rank holds as many as its plan has in flight. Messages to higher ranks and
    to lower ones have a communicator each: within one, both sides post in the order of
    `OverlapPlan.messages`, so that one that works in order cannot deadlock.
    """

    def __init__(
        self,
        stages: PipelineStages,
        number: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        upwards: Any,
        downwards: Any,
    ) -> None:
        self._received = stages.borders[number - 1] if number else ()
        self._made = stages.borders[number]
        super().__init__(
            stages[number], number, len(stages), device, group=group,
            input_args=tuple(spec.empty("meta") for spec in self._received),
            output_args=tuple(spec.empty("meta") for spec in self._made),
        )  # fmt: skip
        self._reads = stages.reads[number]
        self._upwards, self._downwards = upwards, downwards
        self._weights: dict[int, WeightWork] = {}
        self._put_off: dict[int, Tensor | None] = {}

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Gives the module those of the model's inputs that it reads."""
        return self.submod(*args, **{name: kwargs[name] for name in self._reads})

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """Runs a backward, or of a split one the first part; the first stage puts all of it off."""
        if full_backward:
            super().backward_one_chunk(bwd_chunk_id, loss=loss, last_backward=last_backward)
            self._release(bwd_chunk_id)
            return
        if self.is_first:
            self._put_off[bwd_chunk_id] = loss
            return
        outputs, inputs = self.fwd_cache.pop(bwd_chunk_id)
        gradients: Any = (None,)
        if loss is not None:
            outputs = (loss,)
        else:
            gradients = self._retrieve_recv_grads(bwd_chunk_id)
        found, work = backward_inputs(outputs, gradients, inputs, self.submod.parameters())
        self._weights[bwd_chunk_id] = work
        self.bwd_cache[bwd_chunk_id] = found[: len(self._received)]
        self._release(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Runs the second part of a split backward."""
        if self.is_first:
            super().backward_one_chunk(bwd_chunk_id, loss=self._put_off.pop(bwd_chunk_id))
            self._release(bwd_chunk_id)
        else:
            self._weights.pop(bwd_chunk_id).run()

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """A chunk's results on their way to the next stage."""
        return [self._directed(op) for op in super().get_fwd_send_ops(fwd_chunk_id)]

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The gradients of what a chunk got, on their way to the stage before."""
        return [self._directed(op) for op in super().get_bwd_send_ops(bwd_chunk_id)]

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What a chunk gets of the stage before."""
        for info, spec in zip(self.args_recv_info[fwd_chunk_id], self._received, strict=True):
            info.buffer = spec.empty(self.device).detach()
        return [self._directed(op) for op in super().get_fwd_recv_ops(fwd_chunk_id)]

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What a chunk's backward gets of the next stage."""
        self._make_room(bwd_chunk_id)
        return [self._directed(op) for op in super().get_bwd_recv_ops(bwd_chunk_id)]

    def set_local_bwd_input(
        self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int
    ) -> None:
        """Takes the gradients of a next stage on this rank; one that is missing is zero."""
        self._make_room(mb_index)
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def tensors_of(self, chunk: int) -> list[Tensor]:
        """What a chunk received so far."""
        infos = (*self.args_recv_info[chunk], *self.grad_recv_info.get(chunk, ()))
        return [i.buffer for i in infos if i.buffer is not None and not i.buffer.is_meta]

    def _make_room(self, chunk: int) -> None:
        for info, spec in zip(self.grad_recv_info[chunk], self._made, strict=True):
            info.buffer = spec.empty(self.device).detach() if spec.requires_grad else None

    def _release(self, chunk: int) -> None:
        for info in (*self.args_recv_info[chunk], *self.grad_recv_info.get(chunk, ())):
            info.buffer = None

    def _setup_forward_recv_info(self, *args: Any, **kwargs: Any) -> None:
        """Without memory: torch would make room for all microbatches at once."""
        with self._on_meta():
            super()._setup_forward_recv_info(*args, **kwargs)

    def _setup_backward_recv_info(self, *args: Any, **kwargs: Any) -> None:
        """The same for gradients."""
        with self._on_meta():
            super()._setup_backward_recv_info(*args, **kwargs)

    @contextlib.contextmanager
    def _on_meta(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        yield
        self.device = device

    def _directed(self, op: dist.P2POp) -> dist.P2POp:
        """The same message on the communicator of its direction, in one piece of memory."""
        sends = op.op is dist.isend
        group = self._upwards if sends == (op.group_peer > self.group_rank) else self._downwards
        tensor = op.tensor.contiguous() if sends else op.tensor
        return dist.P2POp(op.op, tensor, group=group, group_peer=op.group_peer)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Nothing: `PlanRunner` connects the ranks, and gloo cannot send to itself."""
        return []
