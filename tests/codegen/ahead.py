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
CHANNELS, ODD = 4096, 1001  # odd: every access has a mask
NORMED = (2560, 7168)  # whole rows in registers
HEADER = """# The kernels as compiled for GPUs that were not there

Written by `make aot`, with triton {triton}; do not edit. bf16 streams with products of phi as two
bf16 numbers, or fp32; tiles for 8192 tokens. Registers and stack bytes (spilled registers) of one
thread, shared memory of one program in KiB, loads and stores of global memory in the code and how
many of them move 16 bytes, seconds in Triton. A fault is a spill, more shared memory than the
target has, or a product without matrix instructions.

Kernels are listed where their code differs: the seam's for C = 4096 and, with masks, for 1001, in
fp32 for 1001; those with a norm, which hold whole rows, also for 2560 and 7168; "gates" for one C;
those at the ends of a stream and for few tokens for n = 4.
"""


def _specs() -> Iterator[KernelSpec]:
    for streams in STREAMS:
        yield from kernel_set(streams, CHANNELS, seam_only=streams != 4)
        for channels, dtype in ((ODD, "bf16"), (ODD, "fp32"), *((c, "bf16") for c in NORMED)):
            for spec in kernel_set(streams, channels, dtype, seam_only=True):
                if not spec.op.startswith("gates") and (channels == ODD or spec.norm != "none"):
                    yield spec


def cases() -> Iterator[tuple[KernelSpec, str]]:
    """Every kernel and target of the full set."""
    for spec in _specs():
        yield from ((spec, target) for target in TARGETS)


def case_id(spec: KernelSpec, target: str) -> str:
    return f"{spec.name}-n{spec.streams}-C{spec.channels}-{spec.dtype}-{target}"


def write_row(spec: KernelSpec, target: str, result: Compiled | str) -> None:
    """Keeps the result of one compile, or why there is none."""
    row = {"name": spec.name, "n": spec.streams, "C": spec.channels}
    row |= {"dtype": spec.dtype, "target": target}
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
        head = [row[key] for key in ("name", "n", "C", "dtype", "target")]
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
    rows.sort(key=lambda row: (row[0], row[1], row[2], row[3], order.index(row[4])))
    columns = (
        "kernel", "n", "C", "dtype", "target", "registers", "stack", "shared",
        "matrix instructions", "loads (16 B)", "stores (16 B)", "s",
    )  # fmt: skip
    text = HEADER.format(triton=triton.__version__)
    text += f"\n{len(rows)} compiles, {len(faults)} with faults.\n\n## Faults\n\n"
    text += "\n".join(f"- {fault}" for fault in faults) or "none"
    text += "\n\n## All\n\n" + tabulate(rows, columns, tablefmt="github", disable_numparse=True)
    TABLE.write_text(text + "\n")
    return "\n".join(faults)


if __name__ == "__main__":
    print(write_table())
