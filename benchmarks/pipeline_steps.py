"""Times training steps of a dense model on a pipeline of all GPUs of a machine, or CPU processes.

Each version's loss and gradients are compared with the same model on one process first, in
float32 on few channels; then steps are timed, as long as the slowest rank takes. The prediction is
the plan's makespan, from the times of each rank's own forwards and backwards alone and of a
message between neighbours; `plain` has one stream, the plain residual.

    torchrun --nproc-per-node 2 benchmarks/pipeline_steps.py --json out/pipeline.json
    torchrun --nproc-per-node 2 benchmarks/pipeline_steps.py --device cpu --channels 32 --blocks 4

NVLink multicast is best left off (NCCL_NVLS_ENABLE=0); CUDA_DEVICE_MAX_CONNECTIONS is noted.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from timing import DTYPES, machine, write_json
from torch import Tensor, nn
from training_models import build, make_shape

import mhc_compile as mc

CHECKED = 1e-4
"""Largest difference of a gradient in float32, relative to the model's largest."""


@dataclass(frozen=True)
class Version:
    """One row: streams, the variant, and how the stages run."""

    streams: int
    variant: str = "dualpipev"
    recompute: bool = False
    options: dict[str, Any] | None = field(default=None)


COMPILED = {"recompute": "off"}
VERSIONS = {
    "plain, 1f1b": Version(1, "1f1b"),
    "plain": Version(1),
    "plain, compiled": Version(1, options=COMPILED),
    "mhc, n = 2": Version(2),
    "mhc, 1f1b": Version(4, "1f1b"),
    "mhc, zb1p": Version(4, "zb1p"),
    "mhc": Version(4),
    "mhc, recompute": Version(4, recompute=True),
    "mhc, compiled": Version(4, options=COMPILED),
    "mhc, compiled, overlap": Version(4, options=COMPILED | {"overlap": True}),
}


def loss_fn(result: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of one microbatch."""
    return (result - target).float().square().mean()


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
        self.runner = mc.PlanRunner(self.plan, stages, loss_fn, timeout=args.timeout)
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
            dist.barrier()
            synchronize()
            start = time.perf_counter()
            self.step()
            synchronize()
            taken = most(1e3 * (time.perf_counter() - start), self.runner.device)
            found += [taken] * (k >= 2)  # the first compile and fill caches
            for p in self.runner.parameters():
                p.grad = None
        return found

    def predicted(self) -> float:
        """Milliseconds of the plan at measured costs; its pairs do not overlap."""
        forward, backward = self._alone()
        costs = {"F": forward, "B": backward, "I": backward / 2, "W": backward / 2,
                 "FB": forward + backward, "transfer": self._message()}  # fmt: skip
        return float(self.plan.with_costs(costs).makespan)

    def _alone(self) -> tuple[float, float]:
        """Milliseconds of a forward and a backward of one stage, the largest of all ranks'."""
        worst = [0.0, 0.0]
        for number, module in self.runner.modules.items():
            given = [self.example]
            if number:
                empty = [spec.empty(self.runner.device) for spec in self.borders[number - 1]]
                given = [torch.randn_like(x) for x in empty]
            given = [x.detach().requires_grad_() for x in given]

            def forward(module: nn.Module = module, given: list[Tensor] = given) -> list[Tensor]:
                out = module(*given)
                return list(out) if isinstance(out, tuple | list) else [out]

            def backward(out: list[Tensor]) -> None:
                torch.autograd.backward(out, [torch.ones_like(x) for x in out])

            seconds: list[tuple[float, float]] = []
            for _ in range(5):
                out, first = timed(forward)
                seconds.append((first, timed(lambda out=out: backward(out))[1]))
            for k in range(2):
                worst[k] = max(worst[k], statistics.median(each[k] for each in seconds))
            for p in module.parameters():
                p.grad = None
        return most(worst[0], self.runner.device), most(worst[1], self.runner.device)

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


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the milliseconds that it took."""
    synchronize()
    start = time.perf_counter()
    out = call()
    synchronize()
    return out, 1e3 * (time.perf_counter() - start)


def most(value: float, device: torch.device) -> float:
    """The largest of all ranks' values."""
    whole = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(whole, dist.ReduceOp.MAX)
    return float(whole)


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: checked, timed, predicted."""
    version = VERSIONS[name]
    torch.compiler.reset()
    small = Pipeline(version, args, torch.float32, min(args.channels, 64))
    error = small.difference()
    del small
    if not error <= CHECKED:
        return {"status": f"wrong: off by {error:.1e}", "error": error}
    torch.compiler.reset()
    pipeline = Pipeline(version, args, DTYPES[args.dtype], args.channels)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = pipeline.times(args.repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {
        "status": "ok", "error": error, "step ms": statistics.median(times), "times ms": times,
        "predicted ms": pipeline.predicted(), "peak GiB": most(peak, pipeline.runner.device),
        "bubble": float(pipeline.plan.bubble),
    }  # fmt: skip


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
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU; --device cpu runs on CPU processes")
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node N, one process a GPU")
    local = int(os.environ["LOCAL_RANK"])
    args.place = f"cuda:{local}" if args.device == "cuda" else "cpu"
    if args.device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    start, rows = time.perf_counter(), {}
    for name in args.only or VERSIONS:
        late = most(time.perf_counter() - start, torch.device(args.place)) > args.budget
        rows[name] = (
            {"status": f"not run: the budget of {args.budget:g} s is used up"} if late
            else run(name, args)
        )  # fmt: skip
    if dist.get_rank() == 0:
        report(rows, args)
    dist.destroy_process_group()


def report(rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Prints the table and writes the file."""
    plain = rows.get("plain", {}).get("step ms")
    body = []
    for name, row in rows.items():
        if row["status"] != "ok":
            body.append([name, row["status"]])
            continue
        body.append([
            name, f"{row['step ms']:.2f}", f"{row['step ms'] / plain:.3f}" if plain else "",
            f"{row['predicted ms']:.2f}", f"{row['step ms'] / row['predicted ms']:.2f}",
            f"{row['bubble']:.2f}", f"{row['peak GiB']:.2f}", f"{row['error']:.0e}",
        ])  # fmt: skip
    headers = ["version", "step ms", "x plain", "predicted ms", "of that", "planned bubble",
               "peak GiB", "error"]  # fmt: skip
    print(tabulate(body, headers, tablefmt="github", disable_numparse=True))
    found = {
        "ranks": dist.get_world_size(), "rows": rows,
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
        "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE"),
    }  # fmt: skip
    sizes = f"{args.microbatches} microbatches of {args.batch} x {args.length} tokens, {args.dtype}"
    print(f"\n{found['ranks']} ranks, {args.blocks} blocks, C = {args.channels}, {sizes}")
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    write_json(args, found)


if __name__ == "__main__":
    main()
