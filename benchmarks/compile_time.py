"""How long backend="mhc" compiles, beside backend="inductor", and the share of its own passes.

A training step of a GPT of `--blocks` blocks, compiled from empty caches, forward and backward;
each backend in a process of its own.

    python benchmarks/compile_time.py --blocks 24
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from tabulate import tabulate


def measure(backend: str, blocks: int, channels: int, streams: int) -> dict[str, float]:
    """Seconds of the first step, and of the backend's own passes in it."""
    import torch
    from backend import Block

    import mhc_compile as mc
    from mhc_compile.backend.compile_graph import mhc
    from mhc_compile.backend.records import last_record

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block(channels, 2) for _ in range(blocks)))
    x = torch.randn(2, 16, channels)
    mc.transform(model, streams=streams, example_inputs=(x,))
    model(x).sum().backward()
    compiled = torch.compile(model, backend=mhc if backend == "mhc" else backend, fullgraph=True)
    start = time.perf_counter()
    compiled(x).sum().backward()
    total = time.perf_counter() - start
    record = last_record()
    return {"total": total, "passes": sum(record.seconds.values()) if record else 0.0}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.blocks, args.channels, args.streams)))
        return
    rows = []
    for backend in ("inductor", "mhc"):
        with tempfile.TemporaryDirectory() as caches:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--only", backend], check=True, text=True,
                stdout=subprocess.PIPE, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches},
            )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        share = found["passes"] / (found["total"] - found["passes"])
        rows.append([backend, found["total"], found["passes"], f"{100 * share:.1f} %"])
    headers = ["backend", "first step s", "passes of mhc s", "passes / rest"]
    print(tabulate(rows, headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
