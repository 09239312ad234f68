"""Draws traces of pipeline_steps.py: when each stream of each GPU computes, and when NCCL runs.

python benchmarks/plot_trace.py docs/traces/mhc.json.gz --out out/traces.png
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMPUTE, MESSAGE = ("#3f7fc4", "#3f9150", "#d98f1f"), "#b0b0b0"


def lanes(path: Path) -> dict[tuple[int, str], list[tuple[float, float]]]:
    """Spans in milliseconds by rank and lane: "messages", or a stream."""
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for event in sorted(events, key=lambda e: e["ts"]):
        lane = "messages" if "nccl" in event["name"] else str(event["tid"])
        spans = found.setdefault((event["pid"], lane), [])
        start, length = event["ts"] / 1e3, event["dur"] / 1e3
        if spans and start - sum(spans[-1]) < 0.02:  # gaps that no picture shows
            spans[-1] = spans[-1][0], max(sum(spans[-1]), start + length) - spans[-1][0]
        else:
            spans.append((start, length))
    return {key: spans for key, spans in found.items() if sum(length for _, length in spans) > 1}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws one row of axes a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="a PNG or SVG")
    args = parser.parse_args(arguments)
    every = {path: lanes(path) for path in args.files}
    figure = Figure(
        figsize=(14, 0.9 + 1.0 * sum(map(len, every.values())) / 2.4), layout="constrained"
    )
    FigureCanvasAgg(figure)
    heights = [len(found) for found in every.values()]
    grid = figure.subplots(len(every), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, (path, found) in zip(grid[:, 0], every.items(), strict=True):
        streams: dict[int, int] = {}
        labels = []
        for row, ((rank, lane), spans) in enumerate(sorted(found.items())):
            color = MESSAGE
            if lane != "messages":
                color = COMPUTE[streams.setdefault(rank, 0) % len(COMPUTE)]
                streams[rank] += 1
            axes.broken_barh(spans, (row - 0.4, 0.8), color=color, linewidth=0)
            labels.append(f"GPU {rank}, {'NCCL' if lane == 'messages' else 'compute'}")
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set(ylim=(len(labels) - 0.5, -0.5), title=path.name.removesuffix(".json.gz"))
        axes.title.set_size(9)
    grid[-1, 0].set_xlabel("ms")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
