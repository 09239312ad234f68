"""Arguments of a block's call: what kind of call it is, what varies in it, and its streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mhc_compile._torch_compat import autocast_state
from mhc_compile.config import MHCConfig
from mhc_compile.errors import MHCError, UnsupportedResidualError
from mhc_compile.passes.call_paths import LeafPath, leaves_of, named_leaves, positional_names
from mhc_compile.passes.containers import CONSTANTS, children, is_named_tuple, is_record, rebuilt
from mhc_compile.passes.plan import BlockPlan


class Rewrite(Protocol):
    """What is needed here of an `install_blocks.BlockRewrite`."""

    plan: BlockPlan
    config: MHCConfig
    original: type[nn.Module]


def leaf_order(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    open_names: frozenset[str],
) -> tuple[int, ...]:
    """Positions in the leaves of `BlockRewrite.key` of the generated function's inputs."""
    names = positional_names(forward)
    roots: list[tuple[LeafPath, Any]] = [
        ((names[k],) if k < len(names) else ("*", k - len(names)), value)
        for k, value in enumerate(args)
    ]
    roots += [((name,), value) for name, value in kwargs.items()]
    paths = [
        path for root, value in roots for path, leaf in leaves_of(value, root)
        if root[0] in open_names or not isinstance(leaf, CONSTANTS)
    ]  # fmt: skip
    index = {path: number for number, path in enumerate(paths)}
    return tuple(index[path] for path, _ in named_leaves(forward, args, kwargs) if path in index)


def call_key(value: Any, leaves: list[Any]) -> Any:
    """A hashable description of arguments; what may vary from call to call goes into `leaves`."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return (value.dtype, value.dim(), value.device.type)
    if type(value) in (tuple, list):
        return (type(value), *[call_key(v, leaves) for v in value])
    if type(value) is dict:
        return (dict, *[(k, call_key(v, leaves)) for k, v in value.items()])
    if isinstance(value, CONSTANTS):
        return (type(value), value)
    if is_named_tuple(value) or is_record(value):
        return (type(value), *[(k, call_key(v, leaves)) for k, v in children(value) or ()])
    leaves.append(value)
    return type(value)


def mode_key(block: nn.Module, plan: BlockPlan, attentions: tuple[str, ...]) -> Any:
    """The state outside the arguments on which a trace depends."""
    device = device_of(block)
    opened = tuple(block.get_submodule(name).training for name in sorted(plan.opened))
    kinds = tuple(_implementation(block.get_submodule(name)) for name in attentions)
    return block.training, opened, kinds, autocast_state(device.type)


def attention_modules(block: nn.Module) -> tuple[str, ...]:
    """Submodules whose configurations name an implementation of attention, one each.

    With another implementation a module returns its weights or None in their place.
    """
    found = {id(m.config): name for name, m in block.named_modules() if _implementation(m)}
    return tuple(sorted(found.values()))


def _implementation(module: nn.Module) -> Any:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def device_of(block: nn.Module) -> torch.device:
    """The device of a block's parameters."""
    for tensor in block.parameters():
        return tensor.device
    return torch.device("cpu")


def one_stream(stream: Tensor, rewrite: Rewrite, dims: int) -> Tensor:
    """One stream in the place of n, for tracing the original forward."""
    n = rewrite.config.streams
    if stream.dim() != dims + 1 or stream.shape[-2] != n:
        raise MHCError(
            f"block {rewrite.plan.name!r} takes {n} streams [..., {n}, C] from the block before "
            f"it, got {list(stream.shape)}; call the whole model"
        )
    return stream[..., 0, :]


def many_streams(stream: Tensor, rewrite: Rewrite, dims: int) -> Tensor:
    """A plain example stream as the rewritten model will pass it."""
    n = rewrite.config.streams
    return stream.unsqueeze(-2).expand(*stream.shape[:-1], n, stream.shape[-1])


def replace_streams(
    rewrite: Rewrite,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    change: Callable[[Tensor, Rewrite, int], Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Changes the arguments that carry streams from earlier blocks."""
    changed: dict[int, Tensor] = {}
    for segment in rewrite.plan.segments:
        if segment.expand or rewrite.config.streams == 1:
            continue
        named = dict(named_leaves(rewrite.original.forward, args, kwargs))
        missing = [path for path, _ in segment.stream_inputs
                   if not isinstance(named.get(path), Tensor)]  # fmt: skip
        if missing:
            raise UnsupportedResidualError(
                f"block {rewrite.plan.name!r} ({rewrite.original.__name__}) does not get its "
                f"residual stream as the argument {missing[0]} of forward, as it did in the "
                "recording; leave its sites out with filter_fn"
            )
        for path, dims in segment.stream_inputs:
            changed[id(named[path])] = change(named[path], rewrite, dims)

    def walk(value: Any) -> Any:
        if id(value) in changed:
            return changed[id(value)]
        parts = children(value)
        return value if parts is None else rebuilt(value, [walk(part) for _, part in parts])

    return walk(args), walk(dict(kwargs))
