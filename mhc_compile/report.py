"""The report on a transformed model: what was rewritten, what was compiled, how stable it is."""

from __future__ import annotations

import html
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn

from mhc_compile._torch_compat import compiled_module
from mhc_compile.backend.records import GraphRecord, records_of
from mhc_compile.errors import NotTransformedError
from mhc_compile.memory_use import HEADERS, MemoryUse, memory_use, peak_of
from mhc_compile.passes.example_inputs import resolve_inputs
from mhc_compile.passes.install_blocks import rewritten_blocks
from mhc_compile.passes.plan import ResidualSite
from mhc_compile.runtime.modules import HyperConnection
from mhc_compile.stability import StabilityReport, stability

_TRITON = {
    "seam": "split_phi, project with mix, read",
    "rms norm": "the seam's read",
    "layer norm": "the seam's read",
    "merge and collapse": "pre",
}
"""The generated kernels of a fusion's forward, see docs/kernels.md."""


@dataclass(frozen=True)
class KernelUse:
    """What the backend did at one place of one compiled graph.

    Attributes:
        graph: which of the model's graphs, in the order in which they were compiled.
        site: the connection, as its module's name in the model.
        fusion: "seam", "rms norm", "layer norm", "expand" or "merge and collapse".
        fused: whether it was fused.
        reason: why not, else "".
        runs: what runs it.
    """

    graph: int
    site: str
    fusion: str
    fused: bool
    reason: str
    runs: str


@dataclass(frozen=True)
class Report:
    """What is known of a transformed model; `str` gives tables.

    Attributes:
        sites: the residuals that were rewritten; empty for models that were written with
            `HyperConnection` modules.
        kernels: what `backend="mhc"` fused and what not, in each graph compiled so far.
        graphs: those graphs.
        stability: of one forward on the example inputs, None without.
        memory: recompute plans and the peak of activations, None where nothing is known.
        schedule: None: no pipeline was planned.
    """

    sites: tuple[ResidualSite, ...]
    kernels: tuple[KernelUse, ...]
    graphs: tuple[GraphRecord, ...]
    stability: StabilityReport | None
    memory: MemoryUse | None = None
    schedule: None = None

    def sections(self) -> list[tuple[str, list[str], list[list[Any]]]]:
        """The tables: title, headers and rows."""
        graphs = [
            [k, g.device, g.options.lower, g.kernels, sum(g.operators.values()), g.count("seam"),
             _rebuilt(g), _pieces(g),
             f"{1e3 * sum(g.seconds.values()):.1f}", "; ".join(g.notes)]
            for k, g in enumerate(self.graphs)
        ]  # fmt: skip
        return [
            ("Residuals rewritten", ["site", "stream", "channels", "source"],
             [[s.name, s.stream, s.channels, s.source] for s in self.sites]),
            ('Graphs compiled by backend="mhc"', ["graph", "device", "lower", "operators run by",
             "operators", "seams", "sublayers rebuilt", "pieces", "passes ms", "notes"], graphs),
            ("Fused", ["graph", "site", "fusion", "run by"],
             [[k.graph, k.site, k.fusion, k.runs] for k in self.kernels if k.fused]),
            ("Not fused", ["graph", "site", "fusion", "reason"],
             [[k.graph, k.site, k.fusion, k.reason] for k in self.kernels if not k.fused]),
            ("Recompute plans, MiB at the peak", HEADERS,
             self.memory.rows() if self.memory else []),
        ]  # fmt: skip

    def __str__(self) -> str:
        parts = []
        for title, headers, rows in self.sections():
            table = tabulate(rows, headers, disable_numparse=True)
            parts.append(f"{title}: " + (f"\n{table}" if rows else "none"))
        parts.append(f"Memory: {self._memory()}")
        parts.append(f"Stability: {self._stability()}")
        parts.append("Schedule: none planned")
        return "\n\n".join(parts) + "\n"

    def _stability(self) -> str:
        return "not measured: no example inputs" if not self.stability else f"\n{self.stability}"

    def _memory(self) -> str:
        return "not measured" if self.memory is None else self.memory.summary()

    def to_json(self) -> str:
        """The report as a JSON object; what was not measured is null."""
        graphs = [
            {"options": _plain(asdict(g.options)), "device": g.device, "kernels": g.kernels,
             "operators": g.operators, "blocks": g.blocks, "rebuilt": g.rebuilt,
             "pieces": {name: list(map(asdict, found)) for name, found in g.pieces.items()},
             "seconds": g.seconds, "notes": g.notes}
            for g in self.graphs
        ]  # fmt: skip
        return json.dumps({
            "sites": [asdict(site) for site in self.sites], "graphs": graphs,
            "kernels": [asdict(use) for use in self.kernels],
            "stability": json.loads(self.stability.to_json()) if self.stability else None,
            "memory": self.memory.to_dict() if self.memory else None, "schedule": self.schedule,
        }, indent=2)  # fmt: skip

    def to_html(self, path: str | Path) -> None:
        """Writes the report as one page without scripts."""
        body = []
        for title, headers, rows in self.sections():
            table = tabulate(rows, headers, tablefmt="html") if rows else "<p>none</p>"
            body.append(f"<h2>{html.escape(title)}</h2>\n{table}")
        body.append(f"<h2>Stability</h2>\n<pre>{html.escape(self._stability())}</pre>")
        body.append(f"<h2>Memory</h2>\n<p>{html.escape(self._memory())}</p>")
        body.append("<h2>Schedule</h2>\n<p>none planned</p>")
        style = (
            "body{font:15px/1.45 sans-serif;margin:2em;color:#222}"
            "table{border-collapse:collapse}th,td{padding:.25em .8em;text-align:left;"
            "border-bottom:1px solid #ddd}"
        )
        page = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>mhc_compile report</title><style>{style}</style></head>\n<body>\n"
            "<h1>mhc_compile report</h1>\n" + "\n".join(body) + "\n</body></html>\n"
        )
        Path(path).write_text(page)


def report(model: nn.Module, example_inputs: Any = None, *, measure_memory: bool = False) -> Report:
    """Reports on a transformed model, compiled or not.

    Args:
        model: the model, or what `torch.compile(model, backend="mhc")` returned. The backend's
            part covers the graphs that were compiled so far: call the model once before.
        example_inputs: as for `transform`; with them the stability is measured on one forward.
        measure_memory: whether to run forward and backward on them twice and measure the peak of
            activations and gradients; the model's gradients stay as they are.

    Returns:
        The report; `print` shows it.

    Raises:
        NotTransformedError: the model has no hyper-connections.
        ExampleInputsError: there are none to measure the memory with.

    Example:
        >>> import mhc_compile as mc
        >>> model = nn.Sequential(mc.HyperConnection(8, mc.MHCConfig(streams=2)))
        >>> report(model).kernels
        ()
    """
    plain = compiled_module(model) or model
    blocks = rewritten_blocks(plain)
    if not blocks and not any(isinstance(m, HyperConnection) for m in plain.modules()):
        raise NotTransformedError(
            f"{type(plain).__name__} has no hyper-connections to report on; call "
            "mhc_compile.transform(model) first"
        )
    sites = tuple(site for _, rewrite in blocks.values() for site in rewrite.plan.sites)
    measured, peak = None, None
    if example_inputs is not None or measure_memory:
        args, kwargs = resolve_inputs(plain, example_inputs)
        measured = stability(plain, *args, **kwargs)
        if measure_memory:
            peak = peak_of(model, plain, args, kwargs)
    graphs = tuple(record for record in records_of(plain) if record.operators)
    return Report(sites, _uses(graphs), graphs, measured, memory_use(plain, graphs, peak))


def _rebuilt(graph: GraphRecord) -> str:
    """How many sublayers' streams the backward rebuilds, of how many, in which blocks."""
    if graph.options.plan == "off":
        return "off"
    if graph.rebuilt is None:
        return "not seen: no backward yet, or one from Inductor's cache"
    layers = sum(map(sum, graph.blocks))
    return f"{graph.rebuilt} of {layers}, blocks {', '.join(map(str, graph.blocks))}"


def _pieces(graph: GraphRecord) -> str:
    """Of how many pieces the forward and the backward are made, and how many are not compute."""
    return ", ".join(
        f"{name} {len(found)} ({sum(p.server != 'compute' for p in found)} apart)"
        for name, found in graph.pieces.items()
    )


def _uses(graphs: tuple[GraphRecord, ...]) -> tuple[KernelUse, ...]:
    uses = []
    for number, graph in enumerate(graphs):
        for done in graph.fused:
            runs = {
                "triton": f"Triton: {_TRITON.get(done.kind, '')}",
                "formulas": "Inductor, from its formula",
                "operators": "torch operators",
            }[graph.kernels]
            uses.append(KernelUse(number, done.site, done.kind, True, "", runs))
        uses += [KernelUse(number, n.site, n.kind, False, n.reason, "") for n in graph.not_fused]
    return tuple(uses)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value, default=str))
