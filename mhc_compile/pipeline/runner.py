"""`PlanRunner`: a plan on torch.distributed.pipelining's runtime."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from mhc_compile._torch_compat import pipeline_runtime
from mhc_compile.errors import ConfigError, MHCError, PipelineError
from mhc_compile.passes.block_calls import device_of
from mhc_compile.pipeline.agree import FailureBoard, check_agreement, connect, neighbours
from mhc_compile.pipeline.microbatches import split_inputs, split_target
from mhc_compile.pipeline.placement import check_sizes, place_stage
from mhc_compile.pipeline.shared_parameters import SharedParameters
from mhc_compile.pipeline.stages import PipelineStages
from mhc_compile.runtime.high_priority import high_priority
from mhc_compile.runtime.recompute import Calls, noted_calls, run_last_ahead
from mhc_compile.scheduler.overlap_plan import OverlapPlan

if TYPE_CHECKING:
    from mhc_compile.pipeline.chunk_stage import ChunkStage

Loss = Callable[[Any, Any], Tensor]


class PlanRunner:
    """Runs training steps of a pipeline as a plan says; every rank makes one.

    torch's runtime walks through the plan; what an action does is here: a chunk waits for its
    message just before it reads it, and its result leaves as soon as it is there, within an
    overlapped pair before the other half runs. With `recompute=True` a chunk's last block runs
    again before the chunk waits for its gradient. On CUDA each of a rank's two stages of a V has a
    stream of its own, so that the halves of a pair overlap; there F_post,res after an MLP is
    launched on a third one, of high priority (Sec. 4.3.3), in a chunk's forward alone.

    Args:
        plan: of any variant but "dualpipe"; the same on all ranks.
        stages: of `split_stages`; the same cut on all ranks. Only this rank's are kept.
        loss_fn: `loss_fn(result, target)` of one microbatch, a scalar; None takes the model's own:
            its result, if that is a scalar, or `.loss`.
        device: of this rank's stages; None leaves them where they are.
        group: the ranks of the pipeline; None is all.
        timeout: seconds after which a rank that waits gives up.

    Attributes:
        modules: this rank's stages by their number.

    Raises:
        ConfigError: the plan's variant or size does not fit the ranks or the stages.
        PipelineError: ranks have different plans or stages, or do not all turn up.
    """

    def __init__(
        self,
        plan: OverlapPlan,
        stages: PipelineStages,
        loss_fn: Loss | None = None,
        *,
        device: torch.device | str | None = None,
        group: Any = None,
        timeout: float = 300.0,
    ) -> None:
        check_sizes(plan, stages, group)
        self.plan, self.timeout = plan, timeout
        self.rank = dist.get_rank(group)
        self._splitting = replace(stages, modules=())  # other ranks' stages may be freed
        self._loss_fn = loss_fn or _own_loss
        mine = sorted(stage for stage, _ in plan.layout.slots(self.rank))
        self.modules: dict[int, fx.GraphModule] = {k: stages[k] for k in mine}
        place = device_of(nn.ModuleList(self.modules.values())) if device is None else device
        self.device = torch.device(place)
        for module in (*self.modules.values(), stages.checks):
            place_stage(module, self.device)
        self._losses: dict[int, Tensor] = {}
        self._recomputed: dict[tuple[int, int], Calls] = {}
        self._sends: list[tuple[str, Any]] = []
        self._computing: str | None = None
        self._board = FailureBoard(stages.signature()[:12], plan.ranks)
        with self._explained("its start"):
            self._start(stages, group)

    def _start(self, stages: PipelineStages, group: Any) -> None:
        # Not at the top: mhc_compile is imported where torch has no distributed package too.
        from mhc_compile.pipeline.chunk_stage import ChunkStage, Receives

        self._receives = Receives()
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self._upwards, self._downwards = self._new_group(ranks), self._new_group(ranks)
        check_agreement(self.plan, stages, self._upwards)
        groups = self._upwards, self._downwards
        self._shared = SharedParameters(self.plan.layout, stages, self.modules, groups)
        connect(neighbours(self.plan.layout) | self._shared.pairs, groups, self.device)
        self._shared.make_equal()
        self._stages = {
            k: ChunkStage(
                stages, k, self.device, group, self._upwards, self._downwards, self._receives
            )
            for k in self.modules
        }
        several = self.device.type == "cuda" and len(self._stages) > 1
        self._streams = {k: torch.cuda.Stream(self.device) for k in self._stages if several}
        self._high_priority = torch.cuda.Stream(self.device, priority=-1) if several else None
        runtime, kinds = pipeline_runtime()
        self._runtime = runtime(list(self._stages.values()), self.plan.microbatches,
                                loss_fn=self._loss_fn, scale_grads=False)  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "plan.csv"
            path.write_text(self.plan.to_csv(receives=True))
            self._runtime._load_csv(str(path), format="compute_comms")
        for kind in kinds:
            self._runtime.register_custom_function(kind, self._act)

    def _new_group(self, ranks: list[int]) -> Any:
        return dist.new_group(
            ranks, timeout=timedelta(seconds=self.timeout), use_local_synchronization=True
        )

    def step(self, inputs: Any, target: Any = None) -> Tensor:
        """Runs one forward and backward of a batch and adds up the gradients in `.grad`.

        Args:
            inputs: the whole batch, in the form of the example of `split_stages`, on every rank:
                tensors with M times the example's size in the first dimension are cut into M
                microbatches, those of the example's shape are the same for all.
            target: for `loss_fn`, on the last stage's rank at least: tensors, cut in the same way.

        Returns:
            The mean of the microbatches' losses, a scalar without gradient, on every rank. The
            gradients are those of this mean.

        Raises:
            SplitError: the inputs are of another form or size than the example's.
            PipelineError: another rank failed or did not answer within the timeout.
        """
        count = self.plan.microbatches
        inputs = split_inputs(self._splitting, inputs, count, self.device)
        targets = split_target(target, count, self.device)
        self._losses.clear()
        self._recomputed.clear()
        self._receives.clear()
        self._shared.begin()
        with self._explained("a step"), self._own_streams():
            for stage in self._stages.values():
                stage.has_backward = True
                stage.clear_runtime_states()
            self._runtime._step_microbatches(kwarg_mbs=inputs, target_mbs=targets)
            for what, work in self._sends:
                self._wait(what, [work])
            self._sends.clear()
        with self._explained("the sum of shared gradients"):
            self._shared.add_gradients()
            return self._mean_loss()

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, each once, for its optimizer."""
        every = dict.fromkeys(p for m in self.modules.values() for p in m.parameters())
        return (p for p in every if p not in self._shared.copies)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's parameters and buffers under the names that they have in the model."""
        return {name: t for m in self.modules.values() for name, t in m.state_dict().items()}

    # --- an action ------------------------------------------------------------------------

    def _act(self, action: Any, context: Any) -> None:
        """Runs what torch's runtime calls an action; the halves of a pair one after the other.

        The half that the plan has ready first runs first, as `OverlapPlan.messages` counts on.
        """
        parts = list(action.sub_actions or (action,))
        if len(parts) == 2 and self.plan.costs.b_ready < self.plan.costs.f_ready:
            parts.reverse()
        for part in parts:
            stage, chunk = self._stages[part.stage_index], part.microbatch_index
            with self._stream_of(part.stage_index):
                run = {"F": self._forward, "W": self._weights}.get(
                    part.computation_type.value, self._backward
                )
                run(stage, chunk, part.computation_type.value, context)

    def _forward(self, stage: ChunkStage, chunk: int, kind: str, context: Any) -> None:
        number = stage.stage_index
        self._runtime.fwd_recv_ops.pop((number, chunk), None)
        self._wait(f"the input of {number}F{chunk}", self._receives.take((number, "F", chunk)))
        self._use(stage, chunk)
        with self._compute(f"{number}F{chunk}"):
            with (
                noted_calls() as self._recomputed[number, chunk],
                high_priority(self._high_priority),
            ):
                values = stage.forward_one_chunk(
                    chunk, (), context.kwarg_mbs[chunk], save_forward_output=False
                )
            if stage.is_last:
                loss = self._loss_fn(self._splitting.result(values), context.target_mbs[chunk])
                self._losses[chunk] = loss / self.plan.microbatches
        if number + 1 in self._stages:
            self._hand_over(number, number + 1)
            self._stages[number + 1].set_local_fwd_input(values, chunk)
        elif not stage.is_last:
            self._send(f"the result of {number}F{chunk}", stage.send_result, chunk)

    def _backward(self, stage: ChunkStage, chunk: int, kind: str, context: Any) -> None:
        number = stage.stage_index
        self._runtime.bwd_recv_ops.pop((number, chunk), None)
        works = self._receives.take((number, "B", chunk))
        self._recompute_ahead(stage, chunk)
        self._wait(f"the gradient for {number}{kind}{chunk}", works)
        self._use(stage, chunk)
        loss = self._losses.get(chunk) if stage.is_last else None
        with self._compute(f"{number}{kind}{chunk}"):
            stage.backward_one_chunk(chunk, loss=loss, full_backward=kind == "B")
        if stage.is_last:
            self._losses[chunk] = self._losses[chunk].detach()
        if number - 1 in self._stages:
            self._hand_over(number, number - 1)
            before = self._stages[number - 1]
            before.set_local_bwd_input(stage.get_local_bwd_output(chunk), chunk)
        elif not stage.is_first:
            self._send(f"the input gradient of {number}{kind}{chunk}", stage.send_gradients, chunk)

    def _weights(self, stage: ChunkStage, chunk: int, kind: str, context: Any) -> None:
        with self._compute(f"{stage.stage_index}W{chunk}"):
            stage.backward_weight_one_chunk(chunk)

    def _recompute_ahead(self, stage: ChunkStage, chunk: int) -> None:
        """Runs the last block again before the gradient is there: it needs no message (4.3.3)."""
        calls = self._recomputed.pop((stage.stage_index, chunk))
        if not stage.is_last:
            with self._compute(f"recomputing {stage.stage_index}F{chunk}"):
                run_last_ahead(calls)

    # --- messages, streams, failures ------------------------------------------------------

    def _send(self, what: str, post: Callable[[int], list[Any]], chunk: int) -> None:
        """Posts messages; those that are through are forgotten, with the memory they hold."""
        self._sends = [(name, work) for name, work in self._sends if not work.is_completed()]
        with _naming(f"sending {what}"):
            self._sends += [(what, work) for work in post(chunk)]

    def _wait(self, what: str, works: list[Any]) -> None:
        for work in works:
            with _naming(f"waiting for {what}"):
                work.wait()

    @contextlib.contextmanager
    def _compute(self, action: str) -> Iterator[None]:
        """Marks that what fails here is this rank's own fault."""
        self._computing = action
        yield
        self._computing = None

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Leaves a note for the others where this rank fails, and says why it waited in vain."""
        try:
            yield
        except PipelineError:
            raise
        except Exception as error:
            if self._computing is not None or isinstance(error, MHCError):
                where = self._computing or what
                cause = error.__cause__ or error
                self._board.note(
                    self.rank, f"{where}: {type(cause).__name__}: {_first_line(cause)}"
                )
                error.add_note(f"in {where} on rank {self.rank} of a pipeline")
                raise
            notes = self._board.read()
            why = (
                f"Failed before: {'; '.join(notes)}" if notes else
                "No rank left a note: one of them died or hangs, or works longer than the timeout "
                f"of {self.timeout:g} s; see their logs, or raise timeout="
            )  # fmt: skip
            raise PipelineError(
                f"rank {self.rank} could not finish {what}, {_first_line(error)}. {why}"
            ) from error

    @contextlib.contextmanager
    def _own_streams(self) -> Iterator[None]:
        """The stages' streams begin after what runs so far; what follows begins after them."""
        for stream in self._streams.values():
            stream.wait_stream(torch.cuda.current_stream(self.device))
        yield
        for stream in self._streams.values():
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def _stream_of(self, number: int) -> contextlib.AbstractContextManager[Any]:
        stream = self._streams.get(number)
        return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()

    def _hand_over(self, source: int, target: int) -> None:
        """Lets a stage of this rank wait for what another one made."""
        if self._streams:
            self._streams[target].wait_stream(self._streams[source])

    def _use(self, stage: ChunkStage, chunk: int) -> None:
        """Keeps the memory of what a chunk got until the stage's stream has read it."""
        if self._streams:
            for tensor in stage.tensors_of(chunk):
                tensor.record_stream(self._streams[stage.stage_index])

    def _mean_loss(self) -> Tensor:
        last = int(self.plan.layout.rank_of(self.plan.layout.stages - 1, 0))
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.rank == last:
            loss = torch.stack([x.double() for x in self._losses.values()]).sum()
        dist.broadcast(loss, group=self._upwards, group_src=last)
        return loss


@contextlib.contextmanager
def _naming(doing: str) -> Iterator[None]:
    """Says in a message's error which message it was."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{doing}: {_first_line(error)}") from error


def _own_loss(result: Any, target: Any) -> Tensor:
    """The loss that a model computes itself."""
    loss = getattr(result, "loss", result)
    if not isinstance(loss, Tensor) or loss.dim():
        raise ConfigError(
            f"the model returns no loss but a {type(result).__name__}; give loss_fn, or labels "
            "among the inputs of a model that computes its loss"
        )
    return loss


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
