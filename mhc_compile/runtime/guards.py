"""Checks inside a rewritten block: is the graph still the one that these inputs need?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mhc_compile.errors import TraceError


class GuardMismatch(Exception):  # noqa: N818  # a signal between a graph and its block, not an error
    """The inputs take another way through the block's Python than the traced example did."""


def check_value(value: Any, expected: Any, where: str, early: bool) -> None:
    """Compares a value on which the block's control flow depended at tracing.

    Args:
        value: what it is now.
        expected: what it was.
        where: the source line that looked at it.
        early: nothing has run yet, so the block may try or trace another graph.

    Raises:
        GuardMismatch: they differ and `early`.
        TraceError: they differ and a part of the block has run.
    """
    if isinstance(value, Tensor):
        value = bool(value) if isinstance(expected, bool) else value
        if isinstance(expected, bool) and value == expected:
            return
    elif value == expected:
        return
    if early:
        raise GuardMismatch
    raise TraceError(
        f"the code at {where} saw {expected!r} when the block was traced and {value!r} now; it "
        "depends on a result computed inside the block, so move it into a submodule"
    )


@functools.cache
def opened_check(kind: type) -> Callable[[nn.Module, bool, str], None]:
    """A check of a submodule whose code is part of the graph.

    The function's arguments are what has the submodule's name now, whether it had forward hooks
    when it was traced, and how messages call it. It raises `GuardMismatch` if the submodule was
    replaced by one of another class than `kind` or if hooks came or went, so that the block is
    traced again; and `TraceError` if it has backward hooks, which cannot be called.
    """

    def check_opened(module: nn.Module, hooked: bool, name: str) -> None:
        if type(module) is not kind:
            raise GuardMismatch
        if module._backward_hooks or module._backward_pre_hooks:
            raise TraceError(
                f"{name!r} has a backward hook, but mhc_compile has merged that module into its "
                "block; put the hook on one of its children or on the block"
            )
        if bool(module._forward_hooks or module._forward_pre_hooks) != hooked:
            raise GuardMismatch

    return check_opened


def run_pre_hooks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Calls the forward pre-hooks of a module whose code is part of a graph."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            result = hook(module, args, kwargs)  # type: ignore[call-arg, arg-type]
        else:
            result = hook(module, args)  # type: ignore[call-arg]
        _refuse_result(module, hook, result)


def run_forward_hooks(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Calls the forward hooks of a module whose code is part of a graph."""
    for key, hook in list(module._forward_hooks.items()):
        if key in module._forward_hooks_with_kwargs:
            result = hook(module, args, kwargs, out)  # type: ignore[call-arg, arg-type]
        else:
            result = hook(module, args, out)
        _refuse_result(module, hook, result)


def _refuse_result(module: nn.Module, hook: Callable[..., Any], result: Any) -> None:
    if result is not None:
        raise TraceError(hook_message(module, line_of_hook(hook)))


def hook_message(module: nn.Module, line: str) -> str:
    """Why a hook at a line cannot change what a module gets or returns."""
    return (
        f"a hook of a {type(module).__name__} returns a value ({line}), but mhc_compile has merged "
        "that module into its block; put the hook on one of its children or on the block"
    )


def line_of_hook(hook: Callable[..., Any]) -> str:
    """Where a hook is defined, as "file.py:123"."""
    inner = hook.func if isinstance(hook, functools.partial) else hook
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else f"{inner!r}"
