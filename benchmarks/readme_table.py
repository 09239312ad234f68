"""Writes the README's section of measurements from the JSON files of other benchmarks.

What stands between the two marks is replaced by one table a file, of end_to_end.py, memory.py,
seam.py, kernels.py, training_check.py, pipeline_steps.py, data_parallel.py; without files nothing
changes.

    cd benchmarks/results
    python ../readme_table.py seam.json dense_2048.json dense_4096.json moe*.json training*.json
    python ../readme_table.py dense_*_*.json graph*.json memory.json --page ../../docs/steps.md
    python ../readme_table.py kernels*.json seam_*.json sweep*.json --page ../../docs/kernels.md
    python ../readme_table.py pipeline*.json data_parallel*.json --page ../../docs/several_gpus.md
    python benchmarks/readme_table.py out/dense.json --page docs/backend.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

BEGIN, END = "<!-- measurements: begin -->", "<!-- measurements: end -->"
README = Path(__file__).resolve().parents[1] / "README.md"
Found = dict[str, Any]


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells stay as they are."""
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def where(found: Found) -> str:
    """The device and the versions of a file, and its "note", which was added by hand."""
    setting = found["setting"]
    names = ("gpu", "processor", "driver", "torch", "triton")
    plain = ("gpu", "processor")
    parts = [
        setting[name] if name in plain else f"{name} {setting[name]}"
        for name in names if name in setting
    ]  # fmt: skip
    return ", ".join(parts) + (f"; {found['note']}" if "note" in found else "")


def model_of(found: Found) -> str:
    """The model of a file."""
    s = found["setting"]
    tokens = f"{s['batch']} x {s['length']} tokens, bf16"
    return f"{s['model']}, C = {s['channels']}, {s['blocks']} blocks, {tokens}"


def end_to_end(found: Found) -> str:
    """A table of training steps."""
    rows, body = found["rows"], []
    plain = rows.get("plain", {})

    def ratio(row: Found, key: str) -> str:
        return f"{row[key]['median'] / plain[key]['median']:.3f}" if key in plain else ""

    for name, row in rows.items():
        if row["status"] != "ok":
            body.append([name, row["status"], "", "", "", "", ""])
            continue
        step, both = row["step ms"], row["forward and backward ms"]
        tokens = found["shape"]["batch"] * found["shape"]["length"] / step["median"] * 1e3
        body.append([
            name, f"{step['median']:.2f} ({step['low']:.2f} to {step['high']:.2f})",
            ratio(row, "step ms"), f"{both['median']:.2f}", ratio(row, "forward and backward ms"),
            f"{tokens:,.0f}", f"{row['peak bytes'] / 2**30:.2f}",
        ])  # fmt: skip
    headers = ["version", "step ms (quartiles)", "x plain", "forward and backward ms", "x plain",
               "tokens/s", "peak GiB"]  # fmt: skip
    graph = ", steps as CUDA graphs" if found["setting"]["graph"] else ""
    title = (
        f"Training steps with AdamW, {model_of(found)}, n = {found['setting']['streams']}{graph}"
    )
    return f"{title}; {where(found)}:\n\n{markdown(headers, body)}"


def memory(found: Found) -> str:
    """A table of what a forward and backward keep."""
    body = []
    for row in found["rows"]:
        name = [str(row["streams"]), row["recompute"]]
        if row["status"] != "ok":
            body.append([*name, row["status"], "", "", ""])
            continue
        blocks = "; ".join(", ".join(map(str, chain)) for chain in row.get("blocks", []))
        predicted = f"{row['predicted'] / 2**30:.2f}" if "predicted" in row else ""
        body.append([*name, blocks, f"{row['measured'] / 2**30:.2f}", predicted,
                     f"{row['ms']['median']:.2f}"])  # fmt: skip
    headers = ["n", "recompute", "blocks", "activations' peak GiB", "predicted",
               "forward and backward ms"]  # fmt: skip
    return f"Memory, {model_of(found)}; {where(found)}:\n\n{markdown(headers, body)}"


def kernels(found: Found) -> str:
    """A table of kernels, each alone."""
    s = found["setting"]
    body = [
        [row["kernel"], f"{row['us']:.1f}", f"{row['bytes'] / 1e6:.1f}", f"{row['of copy']:.2f}"]
        for row in found["kernels"]
    ]
    sizes = f"{s['tokens']} tokens, C = {s['hidden']}, n = {s['streams']}, {s['dtype']}"
    copied = f"a copy moves {found['copy_bytes_per_us'] / 1e6:.2f} TB/s"
    table = markdown(["kernel", "us", "MB", "of copy"], body)
    return f"Kernels, {sizes}, {copied}; {where(found)}:\n\n{table}"


def seam(found: Found) -> str:
    """A table of one seam by several libraries."""
    if found["setting"]["sweep"]:
        return sweep(found)
    body = []
    for size in found["sizes"]:
        for name, row in size["rows"].items():
            if row["status"] != "ok":
                continue
            body.append([
                str(size["tokens"]), str(size["hidden"]), str(size["streams"]), name,
                f"{row['forward us']:.0f}", f"{row['forward of copy']:.2f}",
                f"{row['both us']:.0f}", f"{row['both of copy']:.2f}",
            ])  # fmt: skip
    headers = ["tokens", "C", "n", "one seam", "forward us", "of copy", "forward and backward us",
               "of copy"]  # fmt: skip
    title = f"One seam, {found['setting']['dtype']}, and the share of a copy's rate"
    return f"{title}; {where(found)}:\n\n{markdown(headers, body)}"


def sweep(found: Found) -> str:
    """The first library's times in a sweep of sizes, a row for each n and C."""
    sizes = found["sizes"]
    tokens = sorted({size["tokens"] for size in sizes})
    cells: dict[tuple[int, int], dict[int, str]] = {}
    name = "nothing"
    for size in sizes:
        first = next(((n, r) for n, r in size["rows"].items() if not n.startswith("plain")), None)
        if first is None:  # the run ended here
            continue
        name, row = first
        text = row["status"]
        if text == "ok":
            times = f"{row['forward us']:.0f} / {row['both us']:.0f}"
            text = f"{times} ({row['forward of copy']:.2f}, {row['both of copy']:.2f})"
        cells.setdefault((size["streams"], size["hidden"]), {})[size["tokens"]] = text
    body = [
        [str(n), str(c), *(row.get(count, "not run") for count in tokens)]
        for (n, c), row in sorted(cells.items())
    ]
    headers = ["n", "C", *(f"{count} token{'s' * (count > 1)}" for count in tokens)]
    title = (
        f"One seam by {name}, {found['setting']['dtype']}: microseconds forward / forward and "
        "backward, and these as shares of a copy's rate"
    )
    return f"{title}; {where(found)}:\n\n{markdown(headers, body)}"


def training(found: Found) -> str:
    """Two sentences about training runs."""
    s, result = found["setting"], found["compared"]
    bits = f"equal but for {found['differs']}" if found["differs"] else "equal in every bit"
    bits = "not run" if found["differs"] is None else bits
    return (
        f"bf16 training of a small model, {s['steps']} steps, {s['seeds']} seeds: the final losses "
        "with generated kernels and with the formulas differ by "
        f"{result['difference']:+.4f} on average, standard error {result['standard error']:.4f}; "
        f"two runs with one seed are {bits}. {where(found)}."
    )


def pipeline(found: Found) -> str:
    """A table of a pipeline's steps beside the plan's prediction."""
    s, rows, body = found["setting"], found["rows"], []
    plain = rows.get("plain", {}).get("step ms")
    for name, row in rows.items():
        if row["status"] != "ok":
            body.append([name, row["status"], *[""] * 8])
            continue
        step, low, high = row["step ms"], min(row["times ms"]), max(row["times ms"])
        kernels = [f"{row[k]:.0f}" if k in row else "" for k in ("busy ms", "nccl alone ms")]
        body.append([
            name, f"{step:.0f} ({low:.0f} to {high:.0f})", f"{step / plain:.3f}" if plain else "",
            f"{row['predicted ms']:.0f}", f"{step / row['predicted ms']:.2f}", *kernels,
            f"{row['predicted idle ms']:.0f}", f"{row['peak GiB']:.1f}", f"{row['error']:.0e}",
        ])  # fmt: skip
    headers = ["version", "step ms (range)", "x plain", "predicted ms", "of that", "busy ms",
               "nccl alone ms", "predicted idle ms", "peak GiB", "error"]  # fmt: skip
    title = (
        f"{found['ranks']} ranks, dense, C = {s['channels']}, {s['blocks']} blocks, "
        f"{s['microbatches']} microbatches of {s['batch']} x {s['length']} tokens, {s['dtype']}"
    )
    return f"{title}; {where(found)}:\n\n{markdown(headers, body)}"


def data_parallel(found: Found) -> str:
    """A table of steps under DDP and FSDP2."""
    s, rows, body = found["setting"], found["rows"], []
    for key, row in rows.items():
        wrapper, name = key.split(": ")
        if row["status"] != "ok":
            body.append([wrapper, name, row["status"], "", "", ""])
            continue
        base = "plain, eager" if name.endswith("eager") else "plain"
        plain = rows.get(f"{wrapper}: {base}", {}).get("step ms")
        ratio = f"{row['step ms'] / plain:.3f}" if plain else ""
        body.append([wrapper, name, f"{row['step ms']:.1f}", ratio, f"{row['peak GiB']:.1f}",
                     f"{row['error']:.0e}"])  # fmt: skip
    headers = ["wrapper", "version", "step ms", "x plain", "peak GiB", "error"]
    title = (
        f"{found['ranks']} ranks, AdamW, dense, C = {s['channels']}, {s['blocks']} blocks, "
        f"{s['batch']} x {s['length']} tokens a rank, n = {s['streams']}, {s['dtype']}"
    )
    return f"{title}; {where(found)}:\n\n{markdown(headers, body)}"


def several(found: Found) -> str:
    """A table of several GPUs."""
    return pipeline(found) if "microbatches" in found["setting"] else data_parallel(found)


KINDS: tuple[tuple[str, Callable[[Found], str]], ...] = (
    ("flops", end_to_end), ("compared", training), ("sizes", seam),
    ("ranks", several), ("kernels", kernels), ("rows", memory),
)  # fmt: skip
"""The key by which a file is known, the first that it has."""


def section(paths: Sequence[Path]) -> str:
    """The text for some files.

    Raises:
        SystemExit: a file is not one of these benchmarks'.
    """
    parts = []
    for path in paths:
        found = json.loads(path.read_text())
        kinds = [write for key, write in KINDS if key in found]
        if not kinds or "setting" not in found:
            raise SystemExit(f"{path} was not written by one of these benchmarks")
        parts.append(kinds[0](found))
    return "\n\n".join(parts)


def replaced(page: str, text: str) -> str:
    """A page with the section between its marks replaced.

    Raises:
        SystemExit: it has no such marks.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise SystemExit(f"the page needs the two lines {BEGIN} and {END}, once, in this order")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrites the section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--page", type=Path, default=README)
    args = parser.parse_args(arguments)
    paths = [path for path in args.files if path.exists()]
    if not paths:
        sys.stderr.write(f"no measurements: {args.page.name} stays as it is\n")
        return
    args.page.write_text(replaced(args.page.read_text(), section(paths)))


if __name__ == "__main__":
    main()
