"""Modules around a whole stream: no n-stream tensor leaves them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile._torch_compat import tensor_leaves
from mhc_compile.errors import MHCError
from mhc_compile.passes.install_blocks import BlockRewrite, rewrite_of
from mhc_compile.passes.plan import BlockPlan
from mhc_compile.runtime.modules import MARK

_PACKED = "_mhc_used_nested_tensor"
_ENDS = "_mhc_ends"


def collapse_escaped(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of the modules around a whole stream: what leaves them has the plain shape.

    Only states from between blocks can, such as `output_hidden_states` collects; their streams
    are averaged.
    """
    _check_ends(module)
    if not any(hasattr(tensor, MARK) for tensor in tensor_leaves(output)):
        return None
    return _collapsed(output)


def forget_runs(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of the same modules: their blocks have not run yet."""
    if torch.compiler.is_compiling():
        return
    for pair in module.__dict__.get(_ENDS, ()):
        for name in pair:
            _rewrite(module, name).ran = False


def _check_ends(module: nn.Module) -> None:
    """Raises if a stream was expanded in this forward and its last block did not run."""
    if torch.compiler.is_compiling():
        return
    for first, last in module.__dict__.get(_ENDS, ()):
        if _rewrite(module, first).ran and not _rewrite(module, last).ran:
            raise MHCError(
                f"block {_rewrite(module, last).plan.name!r}, which joins the residual streams, "
                "did not run in this forward, so the streams were not joined (layer drop?); set "
                "the model's layer drop to 0, or leave that block's sites out with filter_fn"
            )


def _rewrite(module: nn.Module, name: str) -> BlockRewrite:
    # The block may stand in a wrapper by now, such as torch's for activation checkpointing.
    inside = module.get_submodule(name).modules()
    return next(found for m in inside if (found := rewrite_of(m)) is not None)


def _collapsed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.mean(-2) if hasattr(value, MARK) else value
    if type(value) in (tuple, list):
        return type(value)(_collapsed(v) for v in value)
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _collapsed(value[key])
    return value


def _ends(plans: Iterable[BlockPlan]) -> Iterator[tuple[str, str]]:
    """The first and the last block of each stream that has several."""
    first = ""
    for segment, name in sorted(
        ((s, p.name) for p in plans for s in p.segments),
        key=lambda pair: (pair[0].sites[0].stream, pair[0].first_index),
    ):
        first = name if segment.expand else first
        if segment.collapse and name != first:
            yield first, name


def hook_surroundings(model: nn.Module, plans: Iterable[BlockPlan]) -> None:
    """Puts `collapse_escaped` on every module that holds all blocks of a stream."""
    plans = list(plans)
    ends = list(_ends(plans))
    blocks: dict[int, list[list[str]]] = {}
    for plan in plans:
        for segment in plan.segments:
            blocks.setdefault(segment.sites[0].stream, []).append(plan.name.split(".")[:-1])
    names = set()
    for parts in blocks.values():
        for k in range(min(map(len, parts)) + 1):
            if all(path[:k] == parts[0][:k] for path in parts) and not _cuts(blocks, parts[0][:k]):
                names.add(".".join(parts[0][:k]))
    for name in sorted(names):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(forget_runs)
        module.register_forward_hook(collapse_escaped)
        prefix = f"{name}." if name else ""
        inside = [pair for pair in ends if all(block.startswith(prefix) for block in pair)]
        module.__dict__[_ENDS] = [(a[len(prefix) :], b[len(prefix) :]) for a, b in inside]
        if getattr(module, "use_nested_tensor", False):
            # nn.TransformerEncoder packs padded batches into nested tensors for its fused layers.
            module.__dict__["use_nested_tensor"] = False
            module.__dict__[_PACKED] = True


def _cuts(blocks: dict[int, list[list[str]]], module: list[str]) -> bool:
    """Whether a module holds one part of some stream, so that n streams have to leave or enter."""
    inside = [{path[: len(module)] == module for path in parts} for parts in blocks.values()]
    return any(len(answers) == 2 for answers in inside)


def unhook_surroundings(model: nn.Module) -> None:
    """Undoes `hook_surroundings`."""
    for module in model.modules():
        module.__dict__.pop(_ENDS, None)
        for key, pre_hook in list(module._forward_pre_hooks.items()):
            if pre_hook is forget_runs:
                del module._forward_pre_hooks[key]
        if module.__dict__.pop(_PACKED, False):
            module.__dict__["use_nested_tensor"] = True
        for key, hook in list(module._forward_hooks.items()):
            if hook is collapse_escaped:
                del module._forward_hooks[key]
