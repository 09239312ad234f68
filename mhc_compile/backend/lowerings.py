"""What runs a graph after the passes: Inductor, or AOTAutograd or eager execution for debugging."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from mhc_compile._torch_compat import (
    aot_module,
    compile_piece,
    compile_with_inductor,
    inductor_setting,
)
from mhc_compile.backend.graph_nodes import graphs, mhc_op, value_of
from mhc_compile.backend.lower_operators import LowerOperators, lower_operators
from mhc_compile.backend.options import Options
from mhc_compile.backend.recompute import Recompute
from mhc_compile.backend.records import GraphRecord
from mhc_compile.backend.run_pieces import run_in_pieces
from mhc_compile.backend.tag_ops import tag_ops
from mhc_compile.codegen.spec import MAX_STREAMS
from mhc_compile.errors import MHCError


def choose_kernels(gm: GraphModule, record: GraphRecord) -> str:
    """Decides what runs the operators of a graph: "triton", "formulas" or "operators".

    Raises:
        MHCError: generated kernels are asked for and there are none for the graph.
    """
    options = record.options
    missing = _why_no_triton(gm, record)
    if options.kernels == "triton" and missing and record.operators:
        raise MHCError(
            f"kernels='triton' cannot run this graph: {missing}; kernels='auto' takes what there is"
        )
    if options.kernels != "reference" and not missing:
        return "triton"
    if options.lower == "eager" and options.kernels == "reference" and not missing:
        raise MHCError(
            "kernels='reference' on a CUDA GPU needs lower='inductor' or 'aot_eager': in eager "
            "execution the operators choose their kernels themselves"
        )
    # On a CPU the operators are torch code already, which only Inductor improves on.
    plain = options.lower != "inductor" and record.device == "cpu"
    return "operators" if plain or options.lower == "eager" else "formulas"


def compile_with(
    gm: GraphModule, inputs: Sequence[Any], options: Options, record: GraphRecord
) -> Callable[..., Any]:
    """Compiles a graph as `options.lower` says."""
    if options.lower == "eager":
        return gm.forward
    written_out = bool(record.operators) and record.kernels == "formulas"
    if options.overlap:
        tag_ops(gm.graph)
    if options.lower == "aot_eager" or options.overlap:
        recompute = Recompute(options, record)

        def change(graph: Graph) -> None:
            recompute.finish(graph)
            if written_out:
                lower_operators(graph)

        if not options.overlap:
            return aot_module(gm, inputs, recompute, change)

        def lower(body: GraphModule) -> Callable[..., Any]:
            if options.lower == "aot_eager":
                return body
            return compile_piece(body, options.inductor_config())

        return aot_module(
            gm, inputs, recompute, change, lambda part: run_in_pieces(part, lower, record.pieces)
        )
    config = options.inductor_config()
    if record.operators:
        joint, after = "joint_custom_post_pass", "post_grad_custom_pre_pass"
        config[joint] = recompute = Recompute(
            options, record, config.get(joint, inductor_setting(joint))
        )
        config[after] = LowerOperators(
            written_out, config.get(after, inductor_setting(after)), recompute.finish,
            record.seconds,
        )  # fmt: skip
    return compile_with_inductor(gm, inputs, config)


def _why_no_triton(gm: GraphModule, record: GraphRecord) -> str:
    """Why generated kernels cannot run the operators of a graph; empty where they can."""
    if record.device != "cuda":
        return f"its tensors are on {record.device}, the kernels need a CUDA GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    for graph in graphs(gm):
        for node in graph.nodes:
            streams = value_of(node) if mhc_op(node) in ("expand", "post_res") else None
            if streams is not None and streams.shape[-2] > MAX_STREAMS:
                return f"it has {streams.shape[-2]} streams, the kernels take {MAX_STREAMS}"
            if streams is not None and streams.dtype == torch.float64:
                return "its streams are float64"
    return ""
