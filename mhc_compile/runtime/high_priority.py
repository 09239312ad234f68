"""F_post,res after an MLP on a CUDA stream of high priority (mHC, arXiv 2512.24880, Sec. 4.3.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_offered: ContextVar[torch.cuda.Stream | None] = ContextVar("offered", default=None)
_chosen: ContextVar[torch.cuda.Stream | None] = ContextVar("chosen", default=None)


@contextlib.contextmanager
def high_priority(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Offers a stream to the merges after MLPs that run in a block of code; None offers none.

    What runs again for a backward runs outside of it, on the ordinary stream.
    """
    token = _offered.set(stream)
    try:
        yield
    finally:
        _offered.reset(token)


def on_offered_stream(operator: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Calls an operator; its kernels are launched on the stream that is offered, if one is.

    They alone: with the stream current here, autograd would run the backward on it too.
    """
    token = _chosen.set(_offered.get())
    try:
        return operator(*args)
    finally:
        _chosen.reset(token)


def launch(kernels: Callable[..., Any], *args: Any) -> Any:
    """Runs an operator below autograd, on the stream that was chosen for it.

    The current stream waits at once, so that the arguments' memory may be freed as ever.
    """
    stream = _chosen.get()
    if stream is None:
        return kernels(*args)
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        out = kernels(*args)
    here.wait_stream(stream)
    out.record_stream(here)
    return out
