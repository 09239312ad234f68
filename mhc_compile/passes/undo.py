"""Atomic changes of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def rehearsed(model: nn.Module) -> Iterator[None]:
    """Runs a model for information only: buffers and random state are put back afterwards."""
    buffers = [(b, b.detach().clone()) for b in model.buffers() if b.device.type != "meta"]
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def remember_random_state(model: nn.Module) -> Callable[[], None]:
    """Returns a function that puts the present random state back, so that a run can be repeated."""
    host = torch.get_rng_state()
    others = {device: torch.cuda.get_rng_state(device) for device in _cuda_devices(model)}

    def restore() -> None:
        torch.set_rng_state(host)
        for device, state in others.items():
            torch.cuda.set_rng_state(state, device)

    return restore


def _cuda_devices(model: nn.Module) -> list[str]:
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({str(t.device) for t in tensors if t.device.type == "cuda"})


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Puts every module's class, attributes, children, hooks and mode back if the body raises."""
    modules = list(model.modules())
    classes = [type(m) for m in modules]
    attributes = [dict(m.__dict__) for m in modules]
    inner = [
        {key: dict(value) for key, value in m.__dict__.items() if isinstance(value, dict)}
        for m in modules
    ]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if b.device.type != "meta"]
    try:
        yield
    except BaseException:
        for module, cls, outer, dicts in zip(modules, classes, attributes, inner, strict=True):
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(outer)
            for key, before in dicts.items():
                current = module.__dict__[key]
                # Left alone unless changed: it may be a frozen subclass of dict, as in diffusers.
                if not _same_items(current, before):
                    current.clear()
                    current.update(before)
        for buffer, values in buffers:
            buffer.data.copy_(values)
        raise


def _same_items(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    """Whether two dicts hold the same objects under the same keys in the same order."""
    return list(a) == list(b) and all(a[key] is value for key, value in b.items())
