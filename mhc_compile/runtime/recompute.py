"""`recompute`: a call that keeps its arguments alone and runs again, once, for its backward."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mhc_compile._torch_compat import tensor_leaves
from mhc_compile.errors import MHCError
from mhc_compile.runtime.replay import autocast_of, replay


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `function`; what its backward needs is computed again when it first asks.

    Unlike `torch.utils.checkpoint`, which recomputes for every call of the autograd engine, what
    was recomputed is kept until the graph is freed: a backward in parts (input gradients first,
    those of weights later) recomputes once. Random numbers and autocast are those of the first run.
    Inside `torch.compile` it is `torch.utils.checkpoint`.

    Args:
        function: a module, or a function of tensors; it must do the same when it runs again.
        *args: its arguments; tensors in nested tuples, lists and dicts count too.
        **kwargs: its keyword arguments.

    Returns:
        What `function` returns.

    Raises:
        MHCError: the second run saves other tensors than the first.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> recompute(layer, torch.ones(2, 4)).sum().backward()
        >>> layer.weight.grad.shape
        torch.Size([4, 4])
    """
    if torch.compiler.is_compiling():
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    frame = _Frame(function, args, kwargs)
    if (calls := _noted.get()) is not None:
        calls.append(weakref.ref(frame))
    with torch.autograd.graph.saved_tensors_hooks(frame.pack, _unpack):
        return function(*args, **kwargs)


Calls = list["weakref.ref[_Frame]"]
"""Calls of `recompute`, in their order."""
_noted: ContextVar[Calls | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noted_calls() -> Iterator[Calls]:
    """Notes the calls of `recompute` in a block of code, for `run_last_ahead`."""
    calls: Calls = []
    token = _noted.set(calls)
    try:
        yield calls
    finally:
        _noted.reset(token)


def run_last_ahead(calls: Calls) -> None:
    """Computes again what the last call's backward needs, before there is a gradient for it.

    That call is the first in the backward, so that no more memory is held than there, but longer.
    """
    frame = calls[-1]() if calls else None
    if frame is not None and frame.values is None:
        frame.values = frame.run()


class _Frame:
    """One call: how to repeat it and, after that, what its backward needs.

    The graph's saved tensors refer to it, so that it is freed with the last of them.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.function = function
        self.arguments = tree_map_only(Tensor, _detached, (args, kwargs))
        given = tensor_leaves((args, kwargs))
        self.devices, self.states = torch_checkpoint.get_device_states(*given)
        self.host_state = torch.get_rng_state()
        self.autocast = autocast_of({"cpu", *(t.device.type for t in given)})
        self.shapes: list[tuple[torch.Size, torch.dtype]] = []
        self.values: list[Tensor] | None = None

    def pack(self, value: Tensor) -> tuple[_Frame, int]:
        """Notes a tensor that autograd saves, without keeping it."""
        self.shapes.append((value.shape, value.dtype))
        return self, len(self.shapes) - 1

    def run(self) -> list[Tensor]:
        """Repeats the call and returns the tensors that autograd saves in it."""
        args, kwargs = self.arguments
        with self._random_numbers():
            _, values = replay(self.function, *args, autocast=self.autocast, **kwargs)
        if [(v.shape, v.dtype) for v in values] != self.shapes:
            raise MHCError(
                f"{type(self.function).__name__} saved {len(self.shapes)} tensors for its backward "
                f"and {len(values)} others when it was recomputed; it must do the same both times, "
                "or be called without recompute"
            )
        return values

    @contextlib.contextmanager
    def _random_numbers(self) -> Iterator[None]:
        """Those of the first run."""
        kind = self.devices and torch.accelerator.current_accelerator()
        with torch.random.fork_rng(self.devices, device_type=kind.type if kind else "cuda"):
            torch.set_rng_state(self.host_state)
            torch_checkpoint.set_device_states(self.devices, self.states)
            yield


def _unpack(held: tuple[_Frame, int]) -> Tensor:
    frame, number = held
    if frame.values is None:
        frame.values = frame.run()
    return frame.values[number]


def _detached(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.requires_grad)
