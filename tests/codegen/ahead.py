"""What `make aot` compiles, its results as files, and the table made of them.

`make aot` leaves one JSON file a kernel and target under out/aot and writes docs/kernels_ahead.md;
`python tests/codegen/ahead.py` writes the table alone.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import triton
from tabulate import tabulate

from mhc_compile.codegen.compile_ahead import TARGETS, Compiled
from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.spec import KernelSpec

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "out" / "aot"
TABLE = ROOT / "docs" / "kernels_ahead.md"
STREAMS = (2, 4, 8)
CHANNELS = (2560, 4096, 7168, 1001)  # the last one odd: every access has a mask
HEADER = """# The kernels as compiled for GPUs that were not there

Written by `make aot`, with triton {triton}; do not edit. bf16 streams and products of phi as two
bf16 numbers; tiles for 8192 tokens. Registers and stack bytes (spilled registers) of one thread,
shared memory of one program in KiB, loads and stores of global memory in the code and how many of
them move 16 bytes, seconds in Triton. A fault is a spill, more shared memory than the target has,
or a product without matrix instructions. "gates" kernels do the same work for any C and are listed
for one, as are the kernels at the ends of a stream (a read alone, a mix alone, no norm).
"""


def cases() -> Iterator[tuple[KernelSpec, str]]:
    """Every kernel and target of the full set."""
    for streams in STREAMS:
        for channels in CHANNELS:
            first = channels == CHANNELS[0]
            for spec in kernel_set(streams, channels, seam_only=not first):
                if first or not spec.op.startswith("gates"):
                    yield from ((spec, target) for target in TARGETS)


def case_id(spec: KernelSpec, target: str) -> str:
    return f"{spec.name}-n{spec.streams}-C{spec.channels}-{target}"


def write_row(spec: KernelSpec, target: str, result: Compiled | str) -> None:
    """Keeps the result of one compile, or why there is none."""
    row = {"name": spec.name, "n": spec.streams, "C": spec.channels, "target": target}
    if isinstance(result, str):
        row["faults"] = [result]
    else:
        row |= asdict(result) | {"faults": result.faults}
    ROWS.mkdir(parents=True, exist_ok=True)
    (ROWS / f"{case_id(spec, target)}.json").write_text(json.dumps(row))


def _matrix(row: dict) -> str:
    return ", ".join(f"{count} {name}" for name, count in row["matrix"])


def write_table() -> str:
    """Writes the table; returns the faults, one a line."""
    rows, faults = [], []
    for path in sorted(ROWS.glob("*.json")):
        row = json.loads(path.read_text())
        head = [row["name"], row["n"], row["C"], row["target"]]
        if row["faults"]:
            faults.append(f"{' '.join(map(str, head))}: {'; '.join(row['faults'])}")
        if "registers" not in row:
            rows.append([*head, *[""] * 7])
            continue
        rows.append([
            *head, row["registers"], row["stack"] or "", round(row["shared"] / 1024, 1) or "",
            _matrix(row), f"{row['loads']} ({row['wide_loads']})",
            f"{row['stores']} ({row['wide_stores']})", round(row["seconds"], 1),
        ])  # fmt: skip
    order = list(TARGETS)
    rows.sort(key=lambda row: (row[0], row[1], row[2], order.index(row[3])))
    columns = (
        "kernel", "n", "C", "target", "registers", "stack", "shared", "matrix instructions",
        "loads (16 B)", "stores (16 B)", "s",
    )  # fmt: skip
    text = HEADER.format(triton=triton.__version__)
    text += f"\n{len(rows)} compiles, {len(faults)} with faults.\n\n## Faults\n\n"
    text += "\n".join(f"- {fault}" for fault in faults) or "none"
    text += "\n\n## All\n\n" + tabulate(rows, columns, tablefmt="github", disable_numparse=True)
    TABLE.write_text(text + "\n")
    return "\n".join(faults)


if __name__ == "__main__":
    print(write_table())
