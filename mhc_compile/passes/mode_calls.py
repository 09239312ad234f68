"""Context managers in traced code that change how operations run: no_grad and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from mhc_compile.passes.module_access import patched_attribute
from mhc_compile.passes.tracer import Tracer
from mhc_compile.runtime.modes import enter_autocast, exit_autocast, set_grad_mode

_GRAD_MODES = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled)


@contextlib.contextmanager
def recorded_modes(tracer: Tracer) -> Iterator[None]:
    """Makes entering and leaving these contexts nodes, so that the graph does the same."""
    with contextlib.ExitStack() as stack:
        for kind in _GRAD_MODES:
            for name in ("__enter__", "__exit__"):
                patch = _grad_mode(tracer, kind, kind.__dict__[name], name == "__enter__")
                stack.enter_context(patched_attribute(kind, name, patch))
        autocast = torch.amp.autocast_mode.autocast
        for name in ("__enter__", "__exit__"):
            patch = _autocast(tracer, autocast.__dict__[name], name == "__enter__")
            stack.enter_context(patched_attribute(autocast, name, patch))
        yield


def _grad_mode(tracer: Tracer, kind: type, original: Any, entering: bool) -> Any:
    modes: dict[int, Any] = tracer.modes

    def change(self: Any, *exception: Any) -> Any:
        result = original(self, *exception)
        if tracer.paused or (exception and exception[0] is not None):
            return result
        if entering:
            mode = self.mode if kind is torch.set_grad_enabled else kind is torch.enable_grad
            node = tracer.graph.call_function(set_grad_mode, (mode,))
            modes.setdefault(id(self), []).append(node)
        elif modes.get(id(self)):
            node = tracer.graph.call_function(set_grad_mode, (modes[id(self)].pop(),))
        else:
            return result
        node.meta["effect"] = True
        return result

    return change


def _autocast(tracer: Tracer, original: Any, entering: bool) -> Any:
    modes: dict[int, Any] = tracer.modes

    def change(self: Any, *exception: Any) -> Any:
        result = original(self, *exception)
        if tracer.paused or (exception and exception[0] is not None):
            return result
        if entering:
            node = tracer.graph.call_function(
                enter_autocast, (self.device, self.fast_dtype, self._enabled)
            )
            modes.setdefault(id(self), []).append(node)
        elif modes.get(id(self)):
            node = tracer.graph.call_function(exit_autocast, (modes[id(self)].pop(),))
        else:
            return result
        node.meta["effect"] = True
        return result

    return change
