"""A stage for torch's pipeline runtime: fixed shapes, a communicator for each direction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from mhc_compile.pipeline.split_backward import WeightWork, backward_inputs
from mhc_compile.pipeline.stages import PipelineStages

Key = tuple[int, str, int]
"""A stage, "F" or "B", and a chunk: what a receive is for."""


class Receives:
    """A rank's receives: planned in the order of its plan, posted in that order, and late.

    NCCL's kernels spin on multiprocessors from the moment at which a receive is posted, or a send,
    until the other side is there, and slow down what computes beside them.
    """

    def __init__(self) -> None:
        self._planned: dict[Key, Callable[[], list[Any]]] = {}
        self._posted: dict[Key, list[Any]] = {}

    def plan(self, key: Key, post: Callable[[], list[Any]]) -> None:
        """Adds one; `post` posts it."""
        self._planned[key] = post

    def post_next(self) -> bool:
        """Posts the first that is planned; False if there is none."""
        if not self._planned:
            return False
        key = next(iter(self._planned))
        self._posted[key] = self._planned.pop(key)()
        return True

    def take(self, key: Key) -> list[Any]:
        """Posts one and those before it, if they are not; returns what to wait for."""
        while key in self._planned:
            self.post_next()
        return self._posted.pop(key, [])

    def clear(self) -> None:
        """Forgets what a step that failed left behind."""
        self._planned.clear()
        self._posted.clear()


class ChunkStage(PipelineStage):
    """One of a rank's stages; it runs a chunk at a time.

    What a chunk receives gets its memory when the receive is posted and loses it after the
    backward, so that a rank holds as many as its plan has in flight. Messages to higher ranks and
    to lower ones have a communicator each: within one, both sides post in the order of
    `OverlapPlan.messages`, so that one that works in order cannot deadlock. Receives are posted
    by `receives`, one by one as sends are: torch 2.11's runtime would batch them, and NCCL has
    another communicator for batches, in which no single send arrives.
    """

    def __init__(
        self,
        stages: PipelineStages,
        number: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        upwards: Any,
        downwards: Any,
        receives: Receives,
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
        self._receives = receives

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

    def send_result(self, chunk: int) -> list[Any]:
        """Posts a chunk's results on their way to the next stage."""
        results, _ = self.fwd_cache[chunk]
        return [self._send(value, self.stage_index + 1) for value in results]

    def send_gradients(self, chunk: int) -> list[Any]:
        """Posts the gradients of what a chunk got; one that is missing is zero."""
        # torch 2.11 also keeps the gradients of the inputs that the model reads.
        gradients = self.bwd_cache.pop(chunk)[: len(self._received)]
        pairs = zip(gradients, self._received, strict=True)
        return [
            self._send(spec.empty(self.device).zero_() if value is None else value,
                       self.stage_index - 1)
            for value, spec in pairs if spec.requires_grad
        ]  # fmt: skip

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Plans the receives of what a chunk gets of the stage before; leaves none to torch."""

        def post() -> list[Any]:
            buffers = [spec.empty(self.device).detach() for spec in self._received]
            works = self._receive(buffers, self.stage_index - 1)
            infos = self.args_recv_info[fwd_chunk_id]
            for info, spec, buffer in zip(infos, self._received, buffers, strict=True):
                info.buffer = buffer.requires_grad_(spec.requires_grad)
            return works

        self._receives.plan((self.stage_index, "F", fwd_chunk_id), post)
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The same of what a chunk's backward gets of the next stage."""

        def post() -> list[Any]:
            self._make_room(bwd_chunk_id)
            buffers = [info.buffer for info in self.grad_recv_info[bwd_chunk_id]]
            return self._receive(buffers, self.stage_index + 1)

        self._receives.plan((self.stage_index, "B", bwd_chunk_id), post)
        return []

    def clear_runtime_states(self) -> None:
        """Forgets what a step that failed left behind."""
        kept = (self.fwd_cache, self.bwd_cache, self.output_chunks)
        for state in (*kept, self._weights, self._put_off):
            state.clear()  # type: ignore[attr-defined]
        for chunk in self.args_recv_info:
            self._release(chunk)

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

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        """Without memory: torch would make room for all microbatches at once."""
        with self._on_meta():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        """The same for gradients."""
        with self._on_meta():
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextlib.contextmanager
    def _on_meta(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        yield
        self.device = device

    def _send(self, value: Tensor, stage: int) -> Any:
        peer = self.stage_index_to_group_rank[stage]
        group = self._upwards if peer > self.group_rank else self._downwards
        return dist.isend(value.contiguous(), group=group, group_dst=peer)

    def _receive(self, buffers: Sequence[Tensor | None], stage: int) -> list[Any]:
        peer = self.stage_index_to_group_rank[stage]
        group = self._downwards if peer > self.group_rank else self._upwards
        return [
            dist.irecv(buffer, group=group, group_src=peer)
            for buffer in buffers if buffer is not None
        ]  # fmt: skip

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Nothing: `PlanRunner` connects the ranks, and gloo cannot send to itself."""
        return []
