"""What the recompute solver chooses under each objective, as the table of docs/recompute.md.

No clock runs here: all numbers are the solver's own. "budget" gets the peak of the plan for
"paper", and says how much less the backward can recompute in that memory.

    python benchmarks/recompute_objectives.py --layers 12 16 30 61 120 --streams 4
"""

from __future__ import annotations

import argparse

from tabulate import tabulate

from mhc_compile.scheduler import solve_recompute
from mhc_compile.scheduler.recompute_plan import runs

COLUMNS = (
    "L", "r*", "paper: L_r", "ties", "cost", "peak", "steps", "timeline: blocks", "peak", "steps",
    "budget: blocks", "peak", "steps",
)  # fmt: skip


def rows(layers: list[int], streams: int, kept: float) -> list[list[object]]:
    """One row for each number of sublayers."""
    table: list[list[object]] = []
    for count in layers:
        paper = solve_recompute(count, streams, kept=kept)
        timeline = solve_recompute(count, streams, kept=kept, objective="timeline")
        budget = solve_recompute(
            count, streams, kept=kept, objective="budget", memory_budget=paper.peak
        )
        row: list[object] = [count, f"{paper.continuous:.2f}", paper.block_size]
        row += [", ".join(map(str, paper.ties)), paper.cost, paper.peak, paper.recompute_ops]
        for plan in (timeline, budget):
            row += [runs(plan.block_sizes), plan.peak, plan.recompute_ops]
        table.append(row)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 16, 30, 61, 120])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--kept", type=float, default=1, help="that F keeps of a sublayer, in C")
    given = parser.parse_args(arguments)
    table = rows(given.layers, given.streams, given.kept)
    print(tabulate(table, COLUMNS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
