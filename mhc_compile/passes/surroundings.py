"""Modules around a whole stream: no n-stream tensor leaves them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile._torch_compat import tensor_leaves
from mhc_compile.passes.find_residuals import BlockPlan
from mhc_compile.runtime.modules import MARK

_PACKED = "_mhc_used_nested_tensor"


def collapse_escaped(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of the modules around a whole stream: what leaves them has the plain shape.

    Only states from between blocks can, such as `output_hidden_states` collects; their streams
    are averaged.
    """
    if torch.compiler.is_compiling():
        return None
    if not any(hasattr(tensor, MARK) for tensor in tensor_leaves(output)):
        return None
    return _collapsed(output)


def _collapsed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.mean(-2) if hasattr(value, MARK) else value
    if type(value) in (tuple, list):
        return type(value)(_collapsed(v) for v in value)
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _collapsed(value[key])
    return value


def hook_surroundings(model: nn.Module, plans: Iterable[BlockPlan]) -> None:
    """Puts `collapse_escaped` on every module that holds all blocks of a stream."""
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
        module.register_forward_hook(collapse_escaped)
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
        if module.__dict__.pop(_PACKED, False):
            module.__dict__["use_nested_tensor"] = True
        for key, hook in list(module._forward_hooks.items()):
            if hook is collapse_escaped:
                del module._forward_hooks[key]
