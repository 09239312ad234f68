"""Measures what a forward and backward keep in memory, for numbers of streams and recompute plans.

Activations alone: the peak of what is allocated during a forward and backward, beside parameters,
gradients and optimizer, which are there before. On a GPU by the allocator, on a CPU by the
profiler's memory events. "predicted" is the plan's own figure, with the sizes of the model. First
loss and gradients of each plan are compared with float64 on a small copy of the model.

    python benchmarks/memory.py --channels 4096 --blocks 6 --json out/memory.json
    python benchmarks/memory.py --device cpu --channels 64 --blocks 2 --length 64 --streams 2
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from timing import machine, need_gpu, spread, write_json
from torch._inductor import config as inductor_config
from training_models import Shape, make_shape
from training_steps import Training, Version, check, compiled, failure, time_steps

from mhc_compile.backend.records import last_record
from mhc_compile.runtime.memory_events import peak_bytes

PLANS = ("off", "one block", "paper", "timeline")


def measure(training: Training, version: Version, repeats: int) -> dict[str, Any]:
    """Peak bytes of activations and the milliseconds of a forward and backward."""
    call, device = compiled(training.model, version), training.batch[0].device

    def both(mark: Any = None) -> None:
        call(*training.batch).backward()
        if mark is not None:
            mark()

    for _ in range(2):  # compiles, and makes gradients, which stay
        both()
    row: dict[str, Any] = {"status": "ok", "measured": peak_bytes(both, device.type)}
    row["ms"] = spread([first for first, _ in time_steps(both, repeats, device)])
    if version.backend == "mhc":
        record = last_record()
        assert record is not None
        row |= {"blocks": record.blocks, "rebuilt": record.rebuilt, "notes": record.notes}
        memory = record.choices[0].memory if record.choices else None
        row |= {} if memory is None else {"predicted": memory.peak}
    return row


def measure_all(args: argparse.Namespace, shape: Shape) -> list[dict[str, Any]]:
    """One row for the plain model, then one for each number of streams and plan."""
    device = torch.device(args.device)
    wanted: list[tuple[int, str]] = [(1, "plain")]
    wanted += [(n, plan) for n in args.streams for plan in args.plans]
    rows: list[dict[str, Any]] = []
    for streams in dict.fromkeys(n for n, _ in wanted):
        plans = {plan: _version(plan, 2) for n, plan in wanted if n == streams}
        try:
            checked = check(shape, plans, streams, device, torch.float32)
        except Exception as error:  # of the whole model; other numbers of streams may do
            checked = {plan: {"why": failure(error)} for plan in plans}
        training = Training(shape, "plain" if streams == 1 else "mhc", streams, device)
        for plan in (plan for n, plan in wanted if n == streams):
            name = {"streams": streams, "recompute": plan}
            try:
                row: dict[str, Any] = {"status": checked[plan]["why"]}
                if not row["status"]:
                    row = measure(training, _version(plan, shape.blocks), args.repeats)
            except Exception as error:  # the others' results are worth having
                row = {"status": failure(error)}
            rows.append(name | row | {"checked": checked[plan]})
            print(f"n = {streams}, {plan}: {rows[-1]['status']}", flush=True)
            write_json(args, {"rows": rows})
        del training
        torch.compiler.reset()
        gc.collect()
    return rows


def _version(plan: str, blocks: int) -> Version:
    if plan == "plain":
        return Version("plain", "inductor")
    return Version("mhc", "mhc", {"recompute": 2 * blocks if plan == "one block" else plan})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""

    def size(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / 2**20:.1f}" if key in row else ""

    body = []
    for row in rows:
        blocks = "; ".join(", ".join(map(str, chain)) for chain in row.get("blocks", []))
        share = f"{row['measured'] / row['predicted']:.2f}" if "predicted" in row else ""
        time = f"{row['ms']['median']:.2f}" if "ms" in row else row["status"]
        body.append([row["streams"], row["recompute"], blocks, size(row, "measured"),
                     size(row, "predicted"), share, time])  # fmt: skip
    headers = ["n", "recompute", "blocks", "measured MiB", "predicted MiB", "measured / predicted",
               "forward and backward ms"]  # fmt: skip
    return tabulate(body, headers, tablefmt="github", disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=("dense", "moe"), default="dense")
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4], help="n, beside 1")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args(arguments)
    if args.device == "cuda":
        need_gpu()
    inductor_config.force_disable_caches = True  # what comes from there was not looked at
    torch._dynamo.config.recompile_limit = 4 * len(PLANS)  # plans share their model's code
    shape = make_shape(args.model, args.channels, args.blocks, args.length, args.batch)
    print(table(measure_all(args, shape)))
    where = ", ".join(f"{name} {value}" for name, value in machine().items())
    sizes = f"{args.blocks} blocks, C = {args.channels}, {args.batch} x {args.length} tokens, bf16"
    print(f"\n{args.model}, {sizes}; {where}")


if __name__ == "__main__":
    main()
