"""Measures what recompute plans save and cost in a training step of a GPT, on a CPU.

The peak is that of what forward and backward allocate, gradients included, from the
profiler's memory events. Beside it stands what the plan predicts and, compiled, what the sizes and
lifetimes in the graphs say. Times are medians of steps in turn.

    python benchmarks/recompute_peaks.py --blocks 24 --mode mhc
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from backend import Block
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn import functional as F

import mhc_compile as mc
from mhc_compile.backend import mhc
from mhc_compile.backend.records import last_record
from mhc_compile.runtime.eager_recompute import eager_recompute
from mhc_compile.runtime.memory_events import peak_bytes
from mhc_compile.scheduler.choose_plan import Choice
from mhc_compile.scheduler.recompute_plan import runs

MIB = 2**20


class GPT(nn.Module):
    """Token and position embeddings, blocks, a norm and a head that shares the embedding."""

    def __init__(self, vocabulary: int, length: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, channels)
        self.places = nn.Parameter(0.02 * torch.randn(length, channels))
        self.blocks = nn.ModuleList(Block(channels, channels // 32) for _ in range(blocks))
        self.norm = nn.RMSNorm(channels, eps=1e-6)
        self.head = nn.Linear(channels, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """The loss on the next token of `ids: [B, S]`."""
        x = self.tokens(ids) + self.places
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--mode", choices=("eager", "mhc", "aot_eager"), default="mhc")
    parser.add_argument("--plans", nargs="+", default=["off", "one block", "paper", "timeline"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    inductor_config.force_disable_caches = True  # what comes from there was not looked at
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        ids = torch.randint(0, 256, (args.batch, args.length))
        model = GPT(256, args.length, args.channels, args.blocks).to(dtype)
    mc.transform(model, streams=args.streams, example_inputs=(ids[:1],))
    with torch.no_grad():
        for _, parameter in mc.mhc_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    steps = {name: _step(model, name, args) for name in args.plans}
    rows: dict[str, list[object]] = {}
    wanted: Tensor | None = None
    for name, (step, own) in steps.items():
        got = _gradient(own, step, ids)  # in eager execution the second forward runs the plan
        got = _gradient(own, step, ids)
        error = 0.0 if wanted is None else float((got - wanted).norm() / wanted.norm())
        wanted = got if wanted is None else wanted
        choice, static = _planned(own, args.mode)
        rows[name] = [
            runs(choice.block_sizes) if choice else "",
            choice.memory.peak / MIB if choice and choice.memory else None, static,
            peak_bytes(partial(step, ids), args.device) / MIB, f"{error:.0e}",
        ]  # fmt: skip
        own.zero_grad()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, (step, _) in steps.items():
            start = _now(args.device)
            step(ids)
            times[name].append(1e3 * (_now(args.device) - start))
    base, peak = statistics.median(times[args.plans[0]]), rows[args.plans[0]][3]
    table = []
    for name, (blocks, predicted, static, measured, error) in rows.items():
        took = statistics.median(times[name])
        saved = 100 * (1 - measured / peak)
        table.append(
            [name, blocks, predicted, static, measured, saved, took, 100 * (took / base - 1), error]
        )
    headers = ["plan", "blocks", "predicted MiB", "static", "measured", "saved %", "step ms",
               "slower %", "gradients differ"]  # fmt: skip
    print(tabulate(table, headers, floatfmt=".1f", missingval=""))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.mode}: "
        f"{args.blocks} blocks, n = {args.streams}, C = {args.channels}, "
        f"{args.batch} x {args.length} tokens, {args.dtype}, {args.device}"
    )


Step = Callable[[Tensor], None]


def _step(model: nn.Module, name: str, args: argparse.Namespace) -> tuple[Step, nn.Module]:
    """A step under a plan, and the model that it is a step of."""
    recompute = 2 * args.blocks if name == "one block" else name
    call: Callable[[Tensor], Tensor] = model
    if args.mode == "eager":
        call = model = _with_same_weights(model)
        mc.set_recompute(model, recompute)
    else:
        options = {"recompute": recompute, "lower": args.mode.replace("mhc", "inductor")}
        call = torch.compile(model, backend=mhc, options=options)

    def step(ids: Tensor) -> None:
        model.zero_grad()
        call(ids).backward()

    return step, model


def _with_same_weights(model: nn.Module) -> nn.Module:
    """A copy with hooks of its own."""
    own = copy.deepcopy(model)
    for mine, theirs in zip(own.parameters(), model.parameters(), strict=True):
        mine.data = theirs.data
    return own


def _planned(model: nn.Module, mode: str) -> tuple[Choice | None, float | None]:
    """The plan of the step that ran last, and the static peak in MiB."""
    if mode == "eager":
        hooks = eager_recompute(model)
        return (hooks.choices[0] if hooks else None), None
    record = last_record()
    assert record is not None
    static = None if record.static_peak is None else record.static_peak / MIB
    return (record.choices[0] if record.choices else None), static


def _gradient(model: nn.Module, step: Step, ids: Tensor) -> Tensor:
    step(ids)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
