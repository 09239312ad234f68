"""`split_stages`: cuts a transformed model into the stages of a pipeline, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_compile._torch_compat import tensor_leaves
from mhc_compile.errors import ConfigError, SplitError
from mhc_compile.passes.example_inputs import resolve_inputs
from mhc_compile.passes.undo import rehearsed
from mhc_compile.pipeline.cut_graph import StageGraph, cut_graph
from mhc_compile.pipeline.stage_costs import block_costs
from mhc_compile.pipeline.stages import InputSpec, PipelineStages, ResultNumber, TensorSpec
from mhc_compile.pipeline.trace_model import TracedModel, trace_model
from mhc_compile.runtime.recompute import recompute as recompute_block
from mhc_compile.scheduler.balance_stages import balance_stages
from mhc_compile.scheduler.layout import Layout
from mhc_compile.scheduler.overlap_plan import OverlapPlan

TOLERANCE = 1e-4
"""Largest difference, relative to the output's range, between the stages and the model."""


def split_stages(
    model: nn.Module,
    plan: OverlapPlan | Layout | int,
    example_inputs: Any = None,
    *,
    costs: str | Sequence[float] = "parameters",
    split: Sequence[int] | None = None,
    recompute: bool = False,
) -> PipelineStages:
    """Cuts a transformed model between its blocks into the stages of a pipeline.

    The root's forward is traced with the blocks as calls, in the mode (training or evaluation)
    that the model is in, and cut between these calls; the stages are then compared with the model
    on the example. No class names are looked at. The expansion to n streams lies in the first
    block, the collapse in the last, so that what crosses borders are n streams.

    Every rank cuts the whole model and keeps its stages. A model on the meta device is cut without
    memory or comparison; its stages are filled by `to_empty` and `load_state_dict(strict=False)`.

    Args:
        model: a transformed model; it is not changed, and the stages share its parameters.
        plan: how many stages: those of a plan or layout (P, 2P in a V), or a number.
        example_inputs: one microbatch, as for `transform`: a tuple, a dict, or both. Its shapes
            are those of every microbatch.
        costs: what is evened out: "parameters" (without embeddings, which are looked up), "time"
            of a forward and a backward of each block here and now, which rank 0 measures for all
            where torch.distributed runs, or one number per block.
        split: how many blocks each stage gets, in place of `costs`.
        recompute: whether blocks keep their inputs alone and run again in the backward, once,
            also where it is split into I and W.

    Raises:
        NotTransformedError: the model has no mHC blocks.
        SplitError: its forward cannot be cut there; the message says where and why.
        ConfigError: there are fewer blocks than stages, or `costs` or `split` do not fit.

    Example:
        >>> import mhc_compile as mc
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        >>> model = mc.transform(model, streams=2).train()
        >>> plan = mc.plan_pipeline(2, 4, variant="1f1b")
        >>> stages = split_stages(model, plan, torch.ones(2, 3, 16))
        >>> stages.blocks
        (('layers.0', 'layers.1'), ('layers.2', 'layers.3'))
        >>> str(stages.borders[0][0])
        '[2, 3, 2, 16] float32'
    """
    count = _number_of_stages(plan)
    inputs = resolve_inputs(model, example_inputs)
    traced = trace_model(model, inputs)
    names = [str(call.target) for call in traced.calls]
    if split is None:
        if len(names) < count:
            raise ConfigError(_too_few(model, len(names), count))
        block, first, last = block_costs(model, traced, inputs, costs)
        sizes = balance_stages(block, count, first=first, last=last)
    else:
        sizes = _check_split(split, len(names), count)
    graphs, checks = cut_graph(traced, sizes, recompute_block if recompute else None)
    modules = tuple(_module(model, graph, f"Stage{k}") for k, graph in enumerate(graphs))
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    paths = {
        path: InputSpec(str(n.target), tuple(v.shape) if isinstance(v, Tensor) else None)
        for path, n in traced.inputs.items() for v in [n.meta.get("value")]
    }  # fmt: skip
    stages = PipelineStages(
        modules,
        tuple(tuple(names[a:b]) for a, b in zip(ends, ends[1:], strict=False)),
        (), tuple(graph.inputs for graph in graphs), paths,
        _module(model, checks, "Checks"), checks.inputs, _shared(modules),
        _template(traced), traced.kind, type(model).forward,
    )  # fmt: skip
    return _with_borders(model, stages, inputs)


def _number_of_stages(plan: OverlapPlan | Layout | int) -> int:
    if isinstance(plan, OverlapPlan):
        return plan.layout.stages
    if isinstance(plan, Layout):
        return plan.stages
    if isinstance(plan, bool) or not isinstance(plan, int) or plan < 1:
        raise ConfigError(
            "plan must be an OverlapPlan, a Layout or a number of stages of at least 1, got "
            f"{plan!r}"
        )
    return plan


def _too_few(model: nn.Module, blocks: int, stages: int) -> str:
    return (
        f"{type(model).__name__} calls {blocks} mHC blocks, too few for {stages} stages of at "
        "least one block; use fewer ranks, or variant='zb1p' or '1f1b', which have one stage a "
        "rank where dualpipev has two"
    )


def _check_split(split: Sequence[int], blocks: int, stages: int) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in split)
    if len(sizes) != stages or sum(sizes) != blocks or min(sizes) < 1:
        raise ConfigError(
            f"split must give {stages} stages at least one block each, {blocks} in all, got "
            f"{list(split)}"
        )
    return sizes


def _module(model: nn.Module, graph: StageGraph, name: str) -> fx.GraphModule:
    graph.graph.lint()
    module = fx.GraphModule(model, graph.graph, class_name=name)
    module.train(model.training)
    return module


def _template(traced: TracedModel) -> Any:
    output = next(n for n in reversed(traced.graph.nodes) if n.op == "output")
    numbers: dict[fx.Node, Any] = {n: ResultNumber(k) for k, n in enumerate(output.all_input_nodes)}
    return fx.node.map_arg(output.args[0], lambda n: numbers[n])


def _shared(modules: tuple[fx.GraphModule, ...]) -> tuple[dict[int, str], ...]:
    """Parameters that several stages have."""
    found: dict[int, dict[int, str]] = {}
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            found.setdefault(id(parameter), {})[number] = name
    return tuple(names for names in found.values() if len(names) > 1)


def _with_borders(model: nn.Module, stages: PipelineStages, inputs: Any) -> PipelineStages:
    """Runs the stages one after the other, notes what crosses, and compares with the model."""
    leaves = stages.leaves(inputs)
    on_meta = any(p.device.type == "meta" for p in model.parameters())
    values: tuple[Any, ...] = ()
    borders = []
    with rehearsed(model), torch.enable_grad():
        for module, reads in zip(stages.modules, stages.reads, strict=True):
            values = module(*values, **{name: leaves[name] for name in reads})
            borders.append(tuple(TensorSpec(tuple(v.shape), v.dtype, v.requires_grad)
                                 for v in values))  # fmt: skip
            values = tuple(v.detach().requires_grad_(v.requires_grad) for v in values)
    if not on_meta:
        with rehearsed(model), torch.no_grad():
            args, kwargs = inputs
            wanted = tensor_leaves(model(*args, **kwargs))
        found = tensor_leaves(stages.result(values))
        if len(found) != len(wanted):
            raise SplitError(
                f"the stages return {len(found)} tensors and {type(model).__name__} {len(wanted)}; "
                "states from between the blocks cannot be collected over stages: "
                "output_hidden_states=False, output_attentions=False"
            )
        for a, b in zip(wanted, found, strict=True):
            _compare(model, a, b)
    return replace(stages, borders=tuple(borders))


def _compare(model: nn.Module, a: Tensor, b: Tensor) -> None:
    scale = max(1.0, float(a.abs().max())) if a.numel() else 1.0
    bits = TOLERANCE if a.dtype in (torch.float32, torch.float64) else 0.05
    if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=bits * scale, equal_nan=True):
        raise SplitError(
            f"the stages of {type(model).__name__} give another result than the model; does its "
            "forward depend on something outside its inputs and weights? Otherwise please report it"
        )
