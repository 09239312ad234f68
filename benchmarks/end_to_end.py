"""Times training steps of a transformer, plain and with hyper-connections, in one run.

A step is forward, backward and AdamW in bf16. Versions are first compared with float64 on a small
copy of the model. Then each model is built on the device, its versions run one after the other, and
it is freed; with --interleave all models are there at once and the versions take turns. "step"
and "forward and backward" are times between events on the device, of steps that follow each other
at once; "kernels" is the sum of the times of a step's kernels: where it is far below the step's,
the device waits for Python, whose own time is that until the calls of a step return, the device
being idle when they begin. With --graph a step is one replay of a CUDA graph.

    python benchmarks/end_to_end.py --model dense --channels 4096 --blocks 4 --json out/dense.json
    python benchmarks/end_to_end.py --model moe --blocks 2 --only plain --only mhc
    python benchmarks/end_to_end.py --device cpu --channels 64 --blocks 1 --length 32 --repeats 2
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from timing import kernel_time, machine, need_gpu, spread, write_json
from training_models import Block, Shape, build, make_shape, step_flops
from training_steps import (
    VERSIONS,
    Training,
    check,
    compiled,
    failure,
    time_steps,
)

from mhc_compile.backend.records import last_record
from mhc_compile.runtime.memory_events import peak_bytes

Row = dict[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Run:
    """One version of a model, compiled and warmed up.

    Attributes:
        compile_seconds: what the first two steps took.
        backend: what backend "mhc" did, for the JSON file.
    """

    def __init__(self, training: Training, name: str, graph: bool) -> None:
        self.training, self.device = training, training.batch[0].device
        call = compiled(training.model, VERSIONS[name])
        start = time.perf_counter()
        for _ in range(2):  # the first also makes the optimizer's states
            training.step(call)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.compile_seconds = time.perf_counter() - start
        self.backend = _backend_record() if VERSIONS[name].backend == "mhc" else None
        self._step: Callable[..., None] = partial(training.step, call)
        self.graph = _captured(self._step) if graph else None

    def step(self, mark: Callable[[], None] = lambda: None) -> None:
        """One step; of a graph no moment inside can be marked."""
        if self.graph is None:
            self._step(mark=mark)
        else:
            self.graph.replay()
            mark()

    def kernels(self) -> tuple[float, int] | None:
        """Milliseconds of a step's kernels, and how many there are; None on a CPU."""
        if self.device.type == "cpu":
            return None
        microseconds, count = kernel_time(self.step, 2)
        return microseconds / 1e3, count

    def python(self, repeats: int = 5) -> dict[str, float] | None:
        """Milliseconds until the calls of a step return; None on a CPU, which works in them."""
        if self.device.type == "cpu":
            return None
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.step()
            times.append(1e3 * (time.perf_counter() - start))
        return spread(times)

    def peak(self) -> int:
        """Bytes at the peak of a step, with the model and the optimizer, but of no other model."""
        self.training.optimizer.zero_grad()  # a step starts without gradients
        return self.training.resident + peak_bytes(self._step, self.device.type)


def _backend_record() -> dict[str, Any] | None:
    """What backend "mhc" did with the graph that it compiled last."""
    record = last_record()
    return record and {
        "operators run by": record.kernels, "seams": record.count("seam"),
        "blocks": record.blocks, "rebuilt": record.rebuilt, "notes": record.notes,
    }  # fmt: skip


def _captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of one whole step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def measure(runs: dict[str, Run], repeats: int, until: float) -> dict[str, Row]:
    """Rows of versions that take turns, until there are enough repeats or the time is up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    rounds = max(1, min(5, repeats))
    for _ in range(rounds):
        for name, run in runs.items():
            run.step()  # of another version than the last: its first step is slower
            times[name] += time_steps(run.step, max(1, repeats // rounds), run.device)
        if time.perf_counter() > until:
            break
    rows = {}
    for name, run in runs.items():
        python, kernels = run.python(), run.kernels()
        rows[name] = {
            "status": "ok",
            "step ms": spread([both for _, both in times[name]]),
            "forward and backward ms": spread([first for first, _ in times[name]]),
            "python ms": python,
            "kernels ms": kernels and kernels[0],
            "kernels": kernels and kernels[1],
            "peak bytes": run.peak(),
            "resident bytes": run.training.resident,
            "repeats": len(times[name]),
            "compile seconds": run.compile_seconds,
            "backend": run.backend,
        }
    return rows


def time_versions(
    args: argparse.Namespace, shape: Shape, end: float, save: Callable[[dict[str, Row]], None]
) -> None:
    """Builds models, measures their versions, and saves what is there after each.

    A version for which the time until `end` would not suffice, by the longest so far, is left out.
    """
    device, longest = torch.device(args.device), 0.0
    rows: dict[str, Row] = {}
    together: dict[str, Run] = {}
    for connection in dict.fromkeys(VERSIONS[name].connection for name in args.only):
        training = None
        for name in (n for n in args.only if VERSIONS[n].connection == connection):
            start = time.perf_counter()
            if start + longest > end:
                rows[name] = {"status": f"not run: the budget of {args.budget} s is used up"}
                continue
            try:
                training = training or Training(
                    shape, connection, args.streams, device, capturable=args.graph
                )
                run = Run(training, name, args.graph)
                if args.interleave:
                    together[name] = run
                else:
                    rows |= measure({name: run}, args.repeats, end)
                del run
            except Exception as error:  # the others' results are worth having
                rows[name] = {"status": failure(error)}
            longest = max(longest, time.perf_counter() - start)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
            save(rows)
        if not args.interleave:
            del training
            torch.compiler.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if together:
        rows |= measure(together, args.repeats, end)
    save({name: rows[name] for name in args.only})


def table(rows: dict[str, Row], shape: Shape, flops: float | None) -> str:
    """The rows as text, beside the plain model where that was run."""
    base = rows.get("plain", {}).get("step ms", {}).get("median")
    plain = rows.get("plain", {}).get("forward and backward ms", {}).get("median")
    body = []
    for name, row in rows.items():
        if row["status"] != "ok":
            body.append([name, row["status"]])
            continue
        step, both = row["step ms"], row["forward and backward ms"]
        body.append([
            name, f"{step['median']:.2f} ({step['low']:.2f} to {step['high']:.2f})",
            f"{step['median'] / base:.3f}" if base else "", f"{both['median']:.2f}",
            f"{both['median'] / plain:.3f}" if plain else "",
            "" if row["kernels ms"] is None else f"{row['kernels ms']:.2f} ({row['kernels']})",
            "" if row["python ms"] is None else f"{row['python ms']['median']:.1f}",
            f"{shape.tokens / step['median'] * 1e3:.0f}", f"{row['peak bytes'] / 2**30:.2f}",
            f"{row['compile seconds']:.0f}",
        ])  # fmt: skip
    headers = [
        "version", "step ms (quartiles)", "x plain", "forward and backward ms", "x plain",
        "kernels ms", "Python ms", "tokens/s", "peak GiB", "compile s",
    ]  # fmt: skip
    text = tabulate(body, headers, tablefmt="github", disable_numparse=True)
    if plain and flops:
        text += f"\n\nplain forward and backward: {flops / plain / 1e9:.0f} TFLOP/s of products"
    return text


def run_checks(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Compares with float64 in the dtypes of --check; versions that are wrong are not timed."""
    found: dict[str, Any] = {}
    for name in args.check:
        versions = {version: VERSIONS[version] for version in args.only}
        rows = check(shape, versions, args.streams, torch.device(args.device), DTYPES[name])
        found[name] = rows
        right = [row for row in rows.values() if not row["why"]]
        worst = max((row[k] for row in right for k in row if k not in ("eager", "why")), default=0)
        print(f"{name}: {len(right)} of {len(rows)} versions are within their bounds of float64, "
              f"largest error {worst:.1e}", flush=True)  # fmt: skip
        for version, row in rows.items():
            if row["why"]:
                print(f"{version}: {row['why']}", flush=True)
    return found


def fitting_blocks(args: argparse.Namespace) -> int:
    """Blocks for which memory suffices with 8/10 of what is free, by a plain estimate."""
    free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else 2**30
    with torch.device("meta"):
        block = Block(make_shape(args.model, args.channels, 1, args.length, args.batch))
    count = sum(p.numel() for p in block.parameters())
    unit = 2 * args.channels * args.batch * args.length
    kept = 20 if args.model == "dense" else 60
    # In bf16: parameter, gradient and two states; what a block keeps, and its 2 n streams.
    size = 8 * count + (kept + 2 * args.streams) * unit
    return max(1, int(0.8 * free / size))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with what follows from others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=("dense", "moe"), default="dense")
    parser.add_argument("--channels", type=int, help="C; 2048, or 2560 for moe")
    parser.add_argument("--blocks", type=int, default=4, help="0: as many as fit into memory")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--streams", type=int, default=4, help="n")
    parser.add_argument("--only", action="append", choices=tuple(VERSIONS), help="may be repeated")
    parser.add_argument("--check", nargs="*", choices=tuple(DTYPES), default=["fp32"])
    parser.add_argument("--repeats", type=int, default=20, help="0: checks alone")
    parser.add_argument("--interleave", action="store_true")
    parser.add_argument("--graph", action="store_true", help="steps as CUDA graphs")
    parser.add_argument("--budget", type=float, default=540, help="seconds, then the table")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args(arguments)
    args.only = args.only or list(VERSIONS)
    args.channels = args.channels or (2048 if args.model == "dense" else 2560)
    if args.device == "cuda":
        need_gpu()
    elif args.graph:
        parser.error("--graph needs --device cuda")
    args.blocks = args.blocks or fitting_blocks(args)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks, times, prints."""
    start, args = time.perf_counter(), parse(arguments)
    torch._dynamo.config.recompile_limit = 4 * len(VERSIONS)  # versions share their model's code
    shape = make_shape(args.model, args.channels, args.blocks, args.length, args.batch)
    flops = step_flops(shape, build(shape, "meta", torch.bfloat16))
    found: dict[str, Any] = {"shape": asdict(shape), "flops": flops}
    found["checks"] = run_checks(args, shape)
    bad = {name: row["why"] for checked in found["checks"].values()
           for name, row in checked.items() if row["why"]}  # fmt: skip
    rows: dict[str, Row] = {name: {"status": why} for name, why in bad.items()}
    args.only = [name for name in args.only if name not in bad]

    def save(more: dict[str, Row]) -> None:
        rows.update(more)
        write_json(args, found | {"rows": rows})

    if args.repeats:
        time_versions(args, shape, start + args.budget, save)
        print(table(rows, shape, flops))
    save({})
    if bad:
        print(f"\nnot timed: {', '.join(bad)}")
    where = ", ".join(f"{name} {value}" for name, value in machine().items())
    sizes = f"{args.blocks} blocks, C = {args.channels}, n = {args.streams}"
    print(
        f"\n{args.model}, {sizes}, {args.batch} x {args.length} tokens, bf16, fused AdamW; {where}"
    )


if __name__ == "__main__":
    main()
