"""Finds the best tiles of the generated kernels on this GPU and writes them into a table.

For each kernel of the given sizes it measures the tile that the sizes alone give and those around
it, then those around the best, by replays of a CUDA graph. A tile that spills registers, fails to
compile, or whose results differ from the first one's is pruned. Tiles are compiled ahead by --jobs
processes. The table is read (--table, else the package's), gets what was found, and is written
after each kernel.

    python benchmarks/tune.py --streams 4 8 --hidden 4096 --budget 540 --table out/tiles.json
    python benchmarks/tune.py --streams 8 --hidden 4096 --kernels project mix --json out/tried.json

The package's table is mhc_compile/codegen/tiles.json: copy the result there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from timing import DTYPES, copy_rate, graph_time, machine, need_gpu, write_json

from mhc_compile.codegen import tuning
from mhc_compile.codegen.cache import load
from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.signature import arguments, grid, numbers
from mhc_compile.codegen.spec import KernelSpec
from mhc_compile.codegen.tile_table import read_table
from mhc_compile.codegen.tiles import GIVEN
from mhc_compile.codegen.traffic import traffic
from mhc_compile.codegen.tune_kernel import Trial, best_of, entry_of, tune_kernel

_TYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32,
          "*i32": torch.int32}  # fmt: skip


def compile_one(job: tuple[KernelSpec, int]) -> None:
    """Compiles one kernel into Triton's cache on disk, as a launch would."""
    spec, tokens = job
    moved = traffic(spec, tokens)
    used = moved.read | moved.written | moved.scratch
    given = numbers(spec, tokens) | {"eps": 1e-6}
    values = [
        given[a.name] if a.name in given else _TYPES[a.type] if a.name in used else None
        for a in arguments(spec)
    ]
    # What cannot be compiled fails again, and is noted, where it is tried.
    with contextlib.suppress(Exception):
        load(spec).warmup(
            *values, grid=grid(spec, tokens), num_warps=spec.tile.warps, num_stages=spec.tile.stages
        )


def compile_ahead(
    pool: ProcessPoolExecutor | None, tokens: int, specs: Sequence[KernelSpec]
) -> None:
    """Compiles kernels in other processes; without them each compiles where it is tried."""
    with contextlib.suppress(BrokenProcessPool):
        if pool is not None:
            list(pool.map(compile_one, [(spec, tokens) for spec in specs]))


def cases(args: argparse.Namespace) -> Iterator[tuple[KernelSpec, int]]:
    """Kernels to tune, with their tokens: those of a seam first, each name once for given sizes."""
    for tokens in args.tokens:
        for hidden in args.hidden:
            for streams in args.streams:
                sizes = dict(tokens=tokens)
                first = kernel_set(streams, hidden, args.dtype, seam_only=True, **sizes)
                others = kernel_set(streams, hidden, args.dtype, **sizes) if args.all else ()
                tiled = (spec.tiled_as for spec in (*others, *first))
                for spec in {spec.name: spec for spec in tiled}.values():
                    if spec.op in GIVEN:
                        continue
                    if not args.kernels or spec.name in args.kernels or spec.op in args.kernels:
                        yield spec, tokens


def row_of(
    spec: KernelSpec, tokens: int, tried: Sequence[Trial], rate: float, seconds: float
) -> dict[str, Any]:
    """What was found for one kernel."""
    best, moved = best_of(tried), traffic(spec, tokens)
    size = sum(moved.read.values()) + sum(moved.written.values())
    return {
        "kernel": spec.name, "n": spec.streams, "C": spec.channels, "tokens": tokens,
        "tried": len(tried), "timed": sum(trial.us is not None for trial in tried),
        "default us": tried[0].us, "best us": best.us,
        "of copy": None if best.us is None else size / best.us / rate,
        "best": asdict(best.tile), "default": asdict(tried[0].tile), "seconds": seconds,
        "trials": [asdict(trial) for trial in tried],
    }  # fmt: skip


def shown(row: dict[str, Any]) -> list[Any]:
    """A row of the printed table: the tile's fields that differ from the default's."""
    changed = {k: v for k, v in row["best"].items() if v != row["default"][k]}
    kinds = Counter(trial["why"].split()[0].rstrip(":") for trial in row["trials"] if trial["why"])
    pruned = ", ".join(f"{count} {why}" for why, count in kinds.items())
    names = ("kernel", "n", "C", "tokens", "tried", "default us", "best us", "of copy")
    return [
        *(row[name] for name in names),
        ", ".join(f"{k} {row['default'][k]} to {v}" for k, v in changed.items()) or "the default",
        pruned,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Tries, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096], help="C")
    parser.add_argument("--streams", type=int, nargs="+", default=[4], help="n")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--kernels", nargs="*", help="names or operations; else a whole seam")
    parser.add_argument("--all", action="store_true", help="also what stands at a stream's ends")
    parser.add_argument("--rounds", type=int, default=3, help="how often to go on from the best")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile; 0: none")
    parser.add_argument("--budget", type=float, default=540, help="seconds; then nothing is begun")
    parser.add_argument("--table", type=Path, default=tuning.PACKAGED)
    parser.add_argument("--json", type=Path, help="also write all that was tried to this file")
    args = parser.parse_args(arguments)
    until = time.perf_counter() + args.budget
    device = need_gpu()
    table = read_table(args.table if args.table.exists() else tuning.PACKAGED)
    args.table.parent.mkdir(parents=True, exist_ok=True)
    arch, rate = tuning.architecture(torch.device("cuda", 0)), copy_rate(2**30, device)
    rows: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pool = None
        if args.jobs:
            pool = stack.enter_context(ProcessPoolExecutor(args.jobs, mp_context=spawn))
        for spec, tokens in cases(args):
            start = time.perf_counter()
            if start > until:
                print(f"the budget is used up before {spec.name}, n = {spec.streams}")
                break
            tried = tune_kernel(
                spec, tokens, device, measure=lambda call: graph_time([call] * 3),
                rounds=args.rounds, until=until,
                prepare=functools.partial(compile_ahead, pool, tokens),
            )  # fmt: skip
            rows.append(row_of(spec, tokens, tried, rate, time.perf_counter() - start))
            print(*shown(rows[-1]), sep=" | ", flush=True)
            if (entry := entry_of(spec, tokens, arch, tried)) is not None:
                table.add([entry])
                table.write(args.table)
            write_json(args, {"copy_bytes_per_us": rate, "rows": rows})
            torch.cuda.empty_cache()
    headers = ["kernel", "n", "C", "tokens", "tried", "default us", "best us", "of copy",
               "best tile", "pruned"]  # fmt: skip
    print("\n" + tabulate([shown(row) for row in rows], headers, tablefmt="github",
                          floatfmt=("",) * 5 + (".1f", ".1f", ".2f")))  # fmt: skip
    gained = [row["best us"] / row["default us"] for row in rows
              if row["best us"] and row["default us"]]  # fmt: skip
    if gained:
        mean = math.exp(sum(map(math.log, gained)) / len(gained))
        print(f"\n{args.table}: {len(table.entries)} entries; times fell to {mean:.2f} on average")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))


if __name__ == "__main__":
    main()
