"""Times training steps of a dense model on a pipeline of all GPUs of a machine, or CPU processes.

Each version's loss and gradients are compared with the same model on one process first, in
float32 on few channels; then steps are timed, as long as the slowest rank takes. `plain` has one
stream, the plain residual; "by torch" is torch's ScheduleDualPipeV on the same stages; "without"
leaves out what this library's pair adds, one at a time.

The prediction is the plan's makespan, from the times of each rank's own forwards, backwards and
pairs, each launched behind others so that the GPU is as busy as in a step, and of a message between
neighbours. Of one step the kernels are recorded: "busy" is how long the GPU that computes least
computes, "nccl alone" how long at most only messages ran, which is what they and the waiting for
other ranks cost.

    torchrun --nproc-per-node 2 benchmarks/pipeline_steps.py --json out/pipeline.json --traces out
    torchrun --nproc-per-node 2 benchmarks/pipeline_steps.py --device cpu --channels 32 --blocks 4

NVLink multicast is best left off (NCCL_NVLS_ENABLE=0); CUDA_DEVICE_MAX_CONNECTIONS is noted.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import readme_table
import torch
import torch.distributed as dist
from ranks import (
    begin,
    forget_peak,
    free,
    most,
    peak_gib,
    synchronize,
    timed,
    timed_in_work,
    timed_together,
)
from timing import DTYPES, machine, write_json
from torch import Tensor, nn
from training_models import build, make_shape

import mhc_compile as mc
from mhc_compile.runtime.high_priority import high_priority

CHECKED = 1e-4
"""Largest difference of a gradient in float32, relative to the model's largest."""
WORK = 4
"""Forwards and backwards of a stage before each that is timed."""


@dataclass(frozen=True)
class Version:
    """One row: streams, the variant, and how the stages run."""

    streams: int
    variant: str = "dualpipev"
    recompute: bool = False
    options: dict[str, Any] | None = None
    without: str = ""
    torch: bool = False


COMPILED = {"recompute": "off"}
VERSIONS = {
    "plain, 1f1b": Version(1, "1f1b"),
    "plain, by torch": Version(1, torch=True),
    "plain": Version(1),
    "plain, without late receives": Version(1, without="late receives"),
    "plain, without streams": Version(1, without="streams"),
    "plain, without early sends": Version(1, without="early sends"),
    "plain, without any": Version(1, without="early sends, streams"),
    "plain, recompute": Version(1, recompute=True),
    "plain, compiled": Version(1, options=COMPILED),
    "mhc, n = 2, by torch": Version(2, torch=True),
    "mhc, n = 2": Version(2),
    "mhc, n = 2, without early sends": Version(2, without="early sends"),
    "mhc, n = 2, without streams": Version(2, without="streams"),
    "mhc, 1f1b": Version(4, "1f1b"),
    "mhc, zb1p": Version(4, "zb1p"),
    "mhc, by torch": Version(4, torch=True),
    "mhc": Version(4),
    "mhc, without early sends": Version(4, without="early sends"),
    "mhc, without late receives": Version(4, without="late receives"),
    "mhc, without any": Version(4, without="early sends, streams"),
    "mhc, without streams": Version(4, without="streams"),
    "mhc, without high priority": Version(4, without="high priority"),
    "mhc, recompute": Version(4, recompute=True),
    "mhc, recompute, without early recompute": Version(4, recompute=True,
                                                       without="early recompute"),
    "mhc, compiled": Version(4, options=COMPILED),
    "mhc, compiled, overlap": Version(4, options=COMPILED | {"overlap": True}),
    "mhc, compiled, recompute": Version(4, options={"recompute": "paper"}),
}  # fmt: skip


def loss_fn(result: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of one microbatch."""
    return (result - target).float().square().mean()


class Restricted(mc.PlanRunner):
    """Without early sends (they leave after the pair), streams of its own, or early recompute.

    Or with merges after MLPs on the stage's stream, as they are without streams; or with early
    receives, which are posted an action before they are waited for.
    """

    without = ""

    def _act(self, action: Any, context: Any) -> None:
        self._held: list[tuple[str, Any, int]] = []
        if "streams" in self.without:
            self._streams = {}
        if "streams" in self.without or "high priority" in self.without:
            self._high_priority = None
        if "late receives" in self.without:
            with self._stream_of((action.sub_actions or (action,))[0].stage_index):
                while self._receives.post_next():
                    pass
        super()._act(action, context)
        for what, post, chunk in self._held:
            with self._stream_of(post.__self__.stage_index):
                super()._send(what, post, chunk)

    def _send(self, what: str, post: Any, chunk: int) -> None:
        if "early sends" in self.without:
            self._held.append((what, post, chunk))
        else:
            super()._send(what, post, chunk)

    def _recompute_ahead(self, stage: Any, chunk: int) -> None:
        if "early recompute" not in self.without:
            super()._recompute_ahead(stage, chunk)


class TorchSchedule:
    """torch's own ScheduleDualPipeV, with what `Pipeline` asks of a runner."""

    def __init__(self, plan: mc.OverlapPlan, stages: Any, device: torch.device) -> None:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import ScheduleDualPipeV

        mine = sorted(stage for stage, _ in plan.layout.slots(dist.get_rank()))
        self.modules = {k: stages[k] for k in mine}
        self.device, self.first = device, 0 in self.modules
        self._streams, self._high_priority = {}, None
        held = [PipelineStage(stages[k], k, plan.layout.stages, device) for k in mine]
        self._schedule = ScheduleDualPipeV(
            held, plan.microbatches, loss_fn=lambda out, target: loss_fn(out[0], target)
        )

    def step(self, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        """The first rank has the last stage too."""
        losses: list[Tensor] = []
        if self.first:
            self._schedule.step(*inputs, target=target, losses=losses)
        else:
            self._schedule.step()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if losses:
            loss += torch.stack([x.detach().double() for x in losses]).mean()
        dist.broadcast(loss, 0)
        return loss

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's."""
        return (p for m in self.modules.values() for p in m.parameters())


class Pipeline:
    """A version on this rank, with a batch."""

    def __init__(
        self, version: Version, args: argparse.Namespace, dtype: torch.dtype, channels: int
    ) -> None:
        torch.manual_seed(0)  # the same weights and batches on every rank
        self.plan = mc.plan_pipeline(
            dist.get_world_size(), args.microbatches, variant=version.variant
        )
        shape = make_shape("dense", channels, args.blocks, args.length, args.batch)
        device = torch.device(args.place)
        model = build(shape, device, dtype)
        self.example = torch.randn(args.batch, args.length, channels, device=device, dtype=dtype)
        model = mc.transform(model, streams=version.streams, example_inputs=(self.example,))
        self.serial = model.train()
        stages = mc.split_stages(
            self.serial, self.plan, (self.example,), recompute=version.recompute
        )
        self.borders = stages.borders
        if version.options is not None:
            for stage, _ in self.plan.layout.slots(dist.get_rank()):
                stages[stage].compile(backend="mhc", options=dict(version.options))
        self.serial = copy.deepcopy(self.serial)
        self.runner: Any
        if version.torch:
            self.runner = TorchSchedule(self.plan, stages, torch.device(args.place))
        else:
            self.runner = Restricted(self.plan, stages, loss_fn, timeout=args.timeout)
            self.runner.without = version.without
        rows = (args.batch * args.microbatches, args.length, channels)
        self.batch, self.target = (torch.randn(rows, device=device).to(dtype) for _ in range(2))

    def step(self) -> Tensor:
        """One training step's forward and backward."""
        return self.runner.step((self.batch,), self.target)

    def difference(self) -> float:
        """The largest difference of the loss or a gradient of any rank from one process."""
        loss, count = self.step(), self.plan.microbatches
        alone = torch.zeros((), dtype=torch.float64)
        for rows, goal in zip(self.batch.chunk(count), self.target.chunk(count), strict=True):
            part = loss_fn(self.serial(rows), goal) / count
            part.backward()
            alone += part.detach().double().cpu()
        goals = {n: p.grad for n, p in self.serial.named_parameters() if p.grad is not None}
        largest = max(float(goal.abs().max()) for goal in goals.values())
        worst = abs(float(loss) - float(alone)) / float(alone)
        mine = [pair for m in self.runner.modules.values() for pair in m.named_parameters()]
        for name, p in mine:
            if name in goals:  # a gradient that is missing is wrong too
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                worst = max(worst, float((grad - goals[name]).abs().max()) / largest)
        return most(worst, self.runner.device)

    def times(self, repeats: int) -> list[float]:
        """Milliseconds of steps, the slowest rank's."""
        found = []
        for k in range(repeats + 2):
            taken = timed_together(self.step, self.runner.device)
            found += [taken] * (k >= 2)  # the first compile and fill caches
            for p in self.runner.parameters():
                p.grad = None
        return found

    def predicted(self) -> mc.OverlapPlan:
        """The plan at measured costs, in milliseconds."""
        forward, backward, pair = self._alone()
        costs = {"F": forward, "B": backward, "I": backward / 2, "W": backward / 2, "FB": pair,
                 "transfer": self._message()}  # fmt: skip
        return self.plan.with_costs(costs)

    def _alone(self) -> tuple[float, float, float]:
        """Milliseconds of a forward, a backward and a pair alone, the largest of all ranks'."""
        modules = list(self.runner.modules.items())
        given = {}
        for number, _ in modules:
            values = [self.example]
            if number:
                empty = [spec.empty(self.runner.device) for spec in self.borders[number - 1]]
                values = [torch.randn_like(x) for x in empty]
            given[number] = [x.detach().requires_grad_() for x in values]

        def forward(number: int) -> list[Tensor]:
            out = self.runner.modules[number](*given[number])
            return list(out) if isinstance(out, tuple | list) else [out]

        def backward(out: list[Tensor]) -> None:
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])

        def some_work(number: int) -> None:
            for _ in range(WORK):
                backward(forward(number))

        def pair(first: int, second: int, out: list[Tensor]) -> Any:
            with self._stream(first), high_priority(self.runner._high_priority):
                kept = forward(first)
            with self._stream(second):
                backward(out)
            return kept

        found = torch.zeros(3, dtype=torch.float64)
        for k, (number, _) in enumerate(modules):
            other = modules[k - 1][0]
            seconds = []
            for _ in range(5):
                work = partial(some_work, number)
                out, first = timed_in_work(lambda n=number: forward(n), work)
                _, second = timed_in_work(lambda out=out: backward(out), work)
                with self._stream(other):  # on which autograd runs the backward too
                    out = forward(other)
                run = partial(pair, number, other, out)
                _, both = timed_in_work(run, work, list(self.runner._streams.values()))
                seconds.append((first, second, both))
            medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
            found = torch.maximum(found, torch.tensor(medians, dtype=torch.float64))
        for p in self.runner.parameters():
            p.grad = None
        forward_ms, backward_ms, pair_ms = (most(float(x), self.runner.device) for x in found)
        return forward_ms, backward_ms, pair_ms

    def _stream(self, number: int) -> Any:
        stream = self.runner._streams.get(number)
        return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)

    def _message(self) -> float:
        """Milliseconds of a border's way to the next rank and back, halved."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        value = self.borders[0][0].empty(self.runner.device).detach()
        peer = rank ^ 1
        if ranks < 2 or peer >= ranks:
            return most(0.0, self.runner.device)

        def there_and_back() -> None:
            for sender in (rank & ~1, rank | 1):
                (dist.send if rank == sender else dist.recv)(value, peer)

        for _ in range(2):
            there_and_back()
        return most(statistics.median(timed(there_and_back)[1] / 2 for _ in range(5)),
                    self.runner.device)  # fmt: skip


def record_step(pipeline: Pipeline) -> list[tuple[str, int, float, float]]:
    """The kernels of one step on this rank: name, stream, start and end in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    dist.barrier()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        pipeline.step()
        synchronize()
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name, int(getattr(e, "device_resource_id", 0)), e.time_range.start,
             e.time_range.end) for e in kernels]  # fmt: skip


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of a union of spans."""
    total, end = 0.0, -math.inf
    for a, b in sorted(spans):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def kernels_of(pipeline: Pipeline, name: str, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one step in which kernels compute, or messages alone run; and its trace."""
    kernels = record_step(pipeline)
    whole = covered((a, b) for _, _, a, b in kernels) / 1e3
    busy = covered((a, b) for what, _, a, b in kernels if "nccl" not in what) / 1e3
    device = pipeline.runner.device
    if args.traces:
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, kernels)
        if dist.get_rank() == 0:
            write_trace(args.traces / f"{re.sub('[^a-z0-9]+', '_', name)}.json.gz", every)
    return {"busy ms": -most(-busy, device), "nccl alone ms": most(whole - busy, device)}


def write_trace(path: Path, ranks: list[list[tuple[str, int, float, float]]]) -> None:
    """A trace for ui.perfetto.dev: a process a rank, a track a stream."""
    begin = min((kernel[2] for kernels in ranks for kernel in kernels), default=0.0)
    events = [
        {"ph": "X", "pid": rank, "tid": stream, "name": re.sub(r"<.*|\(.*", "", name)[:40],
         "ts": round(start - begin, 1), "dur": round(end - start, 1)}
        for rank, kernels in enumerate(ranks) for name, stream, start, end in kernels
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: checked, timed, predicted."""
    version = VERSIONS[name]
    if version.torch and version.streams > 1 and torch.__version__ < "2.12":
        # Its split backward adds up gradients of several results as if they were of one.
        return {"status": "not run: torch's split backward fails before 2.12"}
    torch.compiler.reset()
    small = Pipeline(version, args, torch.float32, min(args.channels, 64))
    error = small.difference()
    del small
    free()
    if not error <= CHECKED:
        return {"status": f"wrong: off by {error:.1e}", "error": error}
    torch.compiler.reset()
    pipeline = Pipeline(version, args, DTYPES[args.dtype], args.channels)
    forget_peak()
    times, device = pipeline.times(args.repeats), pipeline.runner.device
    found = {"status": "ok", "error": error, "step ms": statistics.median(times),
             "times ms": times, "peak GiB": peak_gib(device)}  # fmt: skip
    if torch.cuda.is_available():
        found |= kernels_of(pipeline, name, args)
    plan = pipeline.predicted()
    costs = {k: float(getattr(plan.costs, k)) for k in ("F", "B", "FB", "transfer")}
    return found | {"predicted ms": float(plan.makespan), "predicted idle ms": float(plan.bubble),
                    "costs ms": costs}  # fmt: skip


def main() -> None:
    """Checks, times, prints on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=2048, help="C")
    parser.add_argument("--blocks", type=int, default=8, help="of two sublayers each")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a microbatch")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--only", action="append", choices=tuple(VERSIONS), help="may be repeated")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=60, help="seconds that a rank waits")
    parser.add_argument("--budget", type=float, default=540, help="seconds; then nothing is begun")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--traces", type=Path, help="a folder for each version's kernels")
    args, place = begin(parser)
    args.place = str(place)
    start, rows = time.perf_counter(), {}
    for name in args.only or VERSIONS:
        late = most(time.perf_counter() - start, place) > args.budget
        rows[name] = (
            {"status": f"not run: the budget of {args.budget:g} s is used up"} if late
            else run(name, args)
        )  # fmt: skip
        free()
        if dist.get_rank() == 0:
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
            write(rows, args)
    if dist.get_rank() == 0:
        print(readme_table.pipeline(write(rows, args)))
    dist.destroy_process_group()


def write(rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Writes the file, with what is there so far, and returns its content."""
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_NVLS_ENABLE")
    found = {"ranks": dist.get_world_size(), "rows": rows}
    found |= {name: os.environ.get(name) for name in names}
    write_json(args, found)
    return {"setting": vars(args) | machine(), **found}


if __name__ == "__main__":
    main()
