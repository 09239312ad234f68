"""Rows of results, one a model, and the table made of them: `make zoo` writes docs/zoo.md.

A test run leaves one JSON file a model; `python tests/zoo/table.py` turns them into the table.
"""

import json
import re
import sys
from pathlib import Path

from entry import Entry
from tabulate import tabulate

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "out" / "zoo"
TABLE = ROOT / "docs" / "zoo.md"
HEADER = """# The zoo: which architectures are rewritten, and what was checked on each

Written by `make zoo`; do not edit. Every model is tiny, with random weights. Its number of residual
adds was read off its source before any tool ran on it; [text.py](../tests/zoo/text.py) and
[others.py](../tests/zoo/others.py) say where each number comes from. What each check demands, and
how exactly, is in [checks.py](../tests/zoo/checks.py):

| check | what holds |
| --- | --- |
| sites | as many adds a stream as stated, and none refused unless stated |
| step 0, shapes | after `transform` the results are the plain model's, at the example's and at other batch sizes and lengths |
| gradients | in training mode at step 0 the gradients of the original parameters are the plain model's |
| training | with perturbed connections every map of every connection has a gradient, and a step moves it |
| recompute | with perturbed connections, `mc.set_recompute` of blocks of two sublayers and of "timeline" leaves every bit of the gradients |
| reference | with perturbed connections: equal to the plain model's own code run eagerly on n streams ([lockstep.py](../tests/zoo/lockstep.py)), which shares nothing with the tracer and the rewriter |
| generate | `generate()` with its cache gives the plain model's tokens at step 0 |
| cache | with perturbed connections `generate()` gives the same tokens with the cache as without it |
| library's cache differs | the plain model generates otherwise with the cache than without, so the check above says nothing |
| refused | `transform` raises for the stated reason and leaves the model as it was |
"""  # noqa: E501


def path_of(entry: Entry) -> Path:
    return ROWS / f"{re.sub(r'[^A-Za-z0-9.]+', '-', entry.name)}.json"


def write_row(entry: Entry, results: dict[str, str], measured: dict[str, float]) -> None:
    ROWS.mkdir(parents=True, exist_ok=True)
    row = {"checks": results, "measured": measured}
    path_of(entry).write_text(json.dumps(row, indent=1))


def sites_text(entry: Entry) -> str:
    return " + ".join(map(str, entry.sites)) or "0"


def row_of(entry: Entry) -> list[str]:
    results = json.loads(path_of(entry).read_text())["checks"]
    failed = [name for name, result in results.items() if result != "ok"]
    status = "rewritten"
    if entry.refused:
        part = f"{entry.refused[1]} adds refused" if entry.sites else "refused"
        status = f"{part}: {entry.refused[0]}"
    if failed:
        status = f"FAILS: {', '.join(failed)}"
    passed = f"{len(results) - len(failed)} of {len(results)}"
    ways = ", ".join(way.replace("_", " ") for way in entry.generate)
    return [entry.name, sites_text(entry), str(len(entry.sites)), passed, ways, status]


def render(entries: tuple[Entry, ...]) -> str:
    parts, totals = [HEADER], [0, 0, 0]
    for family in dict.fromkeys(entry.family for entry in entries):
        rows = [row_of(entry) for entry in entries if entry.family == family]
        for row in rows:
            passed, count = map(int, row[3].split(" of "))
            totals = [totals[0] + passed, totals[1] + count, totals[2] + ("FAILS" in row[5])]
        heads = ["model", "sites", "streams", "checks passed", "generate()", "status"]
        table = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
        parts.append(f"## {family[0].upper()}{family[1:]}\n\n{table}\n")
    sites = sum(sum(entry.sites) for entry in entries)
    parts.insert(
        1,
        f"{len(entries)} models, {sites} sites, {totals[0]} of {totals[1]} checks passed, "
        f"{totals[2]} models with a failing check.\n",
    )
    return "\n".join(parts)


def stated_in(text: str) -> list[tuple[str, str]]:
    """`(model, sites)` of every row of a rendered table."""
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    cells = [(row[0].strip(), row[1].strip()) for row in rows if len(row) == 6]
    return [cell for cell in cells if cell != ("model", "sites")]


def main() -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    from test_zoo import ENTRIES

    missing = [entry.name for entry in ENTRIES if not path_of(entry).exists()]
    if missing:
        print(f"no results of {', '.join(missing)}; run make zoo")
        return 1
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(render(ENTRIES))
    print(f"wrote {TABLE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
