"""The paper's 27B model as a pipeline of 8 ranks, with modelled costs; no number is measured.

30 mixture-of-experts blocks, C = 2560, n = 4, sequences of 4096 tokens. `model_op_costs` models a
block from work and traffic: ordinary attention in place of MLA, 6 of 72 routed experts and 2 shared
ones of width 1536 (a block then has 120 million active parameters, the paper's 116). A stage holds
4 blocks, in a V 2; that is 32, of which the last two stand for the head. `--picture FILE` draws
dualpipe.
"""

import argparse
from dataclasses import replace

from tabulate import tabulate

import mhc_compile as mc

RANKS, BLOCKS = 8, 4
ROUTED, SHARED, WIDTH = 6, 2, 1536


def costs(streams: int, layers: int, link_gbs: float) -> mc.OpCosts:
    """A stage's ops; shared experts compute and send nothing."""
    table = mc.model_op_costs(
        hidden=2560, tokens=4096, streams=streams, layers=layers, expert_hidden=WIDTH,
        active_experts=ROUTED + SHARED, link_gbs=link_gbs,
    )  # fmt: skip
    part = ROUTED / (ROUTED + SHARED)
    return replace(table, dispatch=table.dispatch * part, combine=table.combine * part)


def main() -> None:
    """Prints a row for each variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--link-gbs", type=float, default=40.0)
    parser.add_argument("--picture", help="of dualpipe, e.g. docs/pipeline_27b.png")
    arguments = parser.parse_args()
    rows, first = [], 0.0
    for variant in ("1f1b", "zb1p", "dualpipev", "dualpipe"):
        layers = BLOCKS // 2 if variant == "dualpipev" else BLOCKS
        plan = mc.plan_pipeline(
            RANKS, arguments.microbatches, variant=variant, streams=arguments.streams,
            costs=costs(arguments.streams, layers, arguments.link_gbs),
        )  # fmt: skip
        first = first or plan.makespan
        of_chunk = [f"{getattr(plan.costs, kind) / 1e3:.1f}" for kind in ("F", "B", "I", "W", "FB")]
        rows.append((
            variant, f"{plan.makespan / 1e3:.0f}", f"{plan.makespan / first:.3f}",
            f"{plan.bubble / plan.makespan:.1%}", max(plan.peak_in_flight) * layers,
            f"{plan.costs.transfer / 1e3:.1f}", *of_chunk,
        ))  # fmt: skip
        if variant == "dualpipe" and arguments.picture:
            plan.plot(arguments.picture)
    headers = ("variant", "makespan ms", "of 1f1b", "bubble", "blocks held", "message ms",
               "F ms", "B ms", "I ms", "W ms", "F&B ms")  # fmt: skip
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
