"""Submodules that a trace goes through: their hooks, and what checks them at every call."""

from __future__ import annotations

from typing import Any

from torch import nn

from mhc_compile.errors import TraceError
from mhc_compile.passes.trace_errors import here
from mhc_compile.passes.tracer import Tracer
from mhc_compile.runtime.guards import run_forward_hooks, run_pre_hooks


def call_opened(
    tracer: Tracer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Traces a module's forward, with its hooks as calls in the graph.

    Hooks see what a reader between sublayers sees: the mean of the streams. One that returns
    something is refused when it does, since nothing could take its result.
    """
    name = tracer.modules[id(module)]
    if module._backward_hooks or module._backward_pre_hooks:
        raise TraceError(
            f"{name!r} in {tracer.label} has a backward hook, but mhc_compile has merged that "
            "module into its block; put the hook on one of its children or on the block"
        )
    if not name:
        return module.forward(*args, **kwargs)
    owner = tracer.attribute(name, module)
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    tracer.opened_seen.setdefault(name, (type(module), hooked, here()))
    if module._forward_pre_hooks:
        tracer.create("call_function", run_pre_hooks, (owner, args, kwargs), {}, None, effect=True)
    out = module.forward(*args, **kwargs)
    if module._forward_hooks:
        tracer.create(
            "call_function", run_forward_hooks, (owner, args, kwargs, out), {}, None, effect=True
        )
    return out
