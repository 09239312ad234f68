"""Times plan_pipeline: orders, checks and simulation, each in a process of its own for its memory.

python benchmarks/planning.py --sizes 8x20 64x512 1024x4096
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

from tabulate import tabulate

import mhc_compile as mc

VARIANTS = ("1f1b", "zb1p", "dualpipe", "dualpipev")


def time_plan(
    ranks: int, microbatches: int, variant: str
) -> tuple[int, float, float, float, float]:
    """Returns actions, makespan, seconds, processor seconds, GB at the peak above the start."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return int(plan.orders.lengths.sum()), plan.makespan, wall, cpu, peak / 1e6


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["8x20", "64x512", "1024x4096"])
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    arguments = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    for size in arguments.sizes:
        ranks, microbatches = map(int, size.split("x"))
        for variant in arguments.variants:
            with context.Pool(1) as pool:
                found = pool.apply(time_plan, (ranks, microbatches, variant))
            rows.append((ranks, microbatches, variant, *found))
    headers = ["P", "M", "variant", "actions", "makespan", "s", "processor s", "GB"]
    formats = ("", "", "", ",", "", ".2f", ".2f", ".2f")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=formats, intfmt=","))


if __name__ == "__main__":
    main()
