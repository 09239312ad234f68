"""What `torch.compile(model, backend="mhc")` does with a captured graph."""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from mhc_compile._torch_compat import ddp_cuts_graphs, log_artifact
from mhc_compile.backend import lowerings
from mhc_compile.backend.check_graph import check_graph, count_operators
from mhc_compile.backend.find_plain_residual import find_plain_residual
from mhc_compile.backend.fuse_collapses import fuse_collapses
from mhc_compile.backend.fuse_expand import fuse_expand
from mhc_compile.backend.fuse_norms import fuse_norms
from mhc_compile.backend.fuse_seams import fuse_seams
from mhc_compile.backend.graph_nodes import arguments, graphs, mhc_op
from mhc_compile.backend.options import Options, parse_options
from mhc_compile.backend.records import GraphRecord, keep
from mhc_compile.codegen.tuning import set_tuning

PASSES = (fuse_seams, fuse_collapses, fuse_norms, fuse_expand)
"""The passes over a captured graph, in this order."""
_log = logging.getLogger(__name__)


def mhc(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a graph of a transformed model: the backend "mhc" of torch.compile.

    It fuses the operators `torch.ops.mhc.*` of neighbouring sublayers (`PASSES`), chooses what
    runs them, and hands the graph to Inductor. `mhc_compile.report(model)` tells what was done;
    `TORCH_LOGS="+mhc_compile"` prints the graph before and after each pass.

    Args:
        gm: the graph, as Dynamo captures it.
        example_inputs: its inputs.
        mode: as `mode=` of torch.compile, for Inductor.
        options: the fields of `mhc_compile.backend.options.Options`.

    Returns:
        The compiled function.

    Raises:
        ConfigError: an option is wrong.
        MHCError: `kernels="triton"` where there are none.

    Example:
        >>> import mhc_compile as mc
        >>> model = torch.nn.Sequential(mc.HyperConnection(8, mc.MHCConfig(streams=2)))
        >>> compiled = torch.compile(model, backend="mhc", options={"lower": "eager"})
        >>> [part.shape for part in compiled(torch.randn(3, 2, 8))]
        [torch.Size([3, 8]), torch.Size([3, 2]), torch.Size([3, 2, 2])]
    """
    chosen = parse_options(options, mode)
    if chosen.tune is not None:
        set_tuning(chosen.tune)
    record = _start_record(gm, example_inputs, chosen)
    if chosen.fuse and record.operators:
        run_passes(gm, record)
    if not record.operators and any(find_plain_residual(graph) for graph in graphs(gm)):
        _warn(
            record,
            "the graph has residual adds and no hyper-connections: call "
            "mhc_compile.transform(model) before torch.compile; it is compiled as it is",
        )
    if chosen.fuse and record.operators and ddp_cuts_graphs() and _begins_at_a_read(gm):
        _warn(
            record,
            "no merge is beside the next sublayer's read, for torch.compile cuts graphs at the "
            "buckets of DistributedDataParallel: nothing is fused or recomputed over cuts; compile "
            "the model's blocks one by one instead, with torch._dynamo.config.optimize_ddp = False",
        )
    if (
        record.operators
        and chosen.recompute not in (None, "off")
        and (chosen.lower == "eager" or not chosen.fuse)
    ):
        _warn(record, "nothing is recomputed: that needs fuse=True and another lower=")
    keep(record)
    return lowerings.compile_with(gm, example_inputs, chosen, record)


def run_passes(gm: GraphModule, record: GraphRecord) -> None:
    """Runs `PASSES` on a graph and on the bodies within it, in place."""
    for graph in graphs(gm):
        captured = count_operators(graph)
        if not captured:
            continue
        before = record.count("merge and collapse")
        for run in PASSES:
            name = run.__name__
            _dump(f"before {name}", gm)
            start = time.perf_counter()
            run(graph, record)
            taken = time.perf_counter() - start
            record.seconds[name] = record.seconds.get(name, 0.0) + taken
            check_graph(graph, captured, record.count("merge and collapse") - before, name)
            _log.debug("%s took %.1f ms", name, 1e3 * taken)
    for part in gm.modules():
        if isinstance(part, GraphModule):
            part.recompile()
    _dump("after the passes", gm)


def _warn(record: GraphRecord, note: str) -> None:
    """Says something now and in the report."""
    record.notes.append(note)
    warnings.warn(f"backend='mhc': {note}", stacklevel=3)


def _begins_at_a_read(gm: GraphModule) -> bool:
    """Whether a graph without seams reads streams that come from outside of it."""
    if any(count_operators(graph)["seam"] for graph in graphs(gm)):
        return False
    reads = (node for node in gm.graph.nodes if mhc_op(node) in ("read", "coefficients"))
    return any(arguments(node)[0].op == "placeholder" for node in reads)


def _start_record(gm: GraphModule, inputs: Sequence[Any], options: Options) -> GraphRecord:
    counts = sum((count_operators(graph) for graph in graphs(gm)), Counter[str]())
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    kinds = {t.device.type for t in tensors}
    device = "cuda" if "cuda" in kinds else next(iter(sorted(kinds)), "cpu")
    record = GraphRecord(options, device, operators=dict(counts))
    parameters = [t for t in tensors if isinstance(t, torch.nn.Parameter)]
    parameters += list(gm.parameters())
    record.parameters = [weakref.ref(p) for p in parameters]
    record.kernels = lowerings.choose_kernels(gm, record)
    return record


def _dump(name: str, gm: GraphModule) -> None:
    if _log.isEnabledFor(logging.DEBUG):
        text = gm.print_readable(print_output=False)
        _log.debug("%s\n%s", name, text)
    log_artifact(f"mhc_{name.replace(' ', '_')}", lambda: gm.print_readable(print_output=False))
