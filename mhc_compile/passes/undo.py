"""Atomic changes of a model, and runs that leave no trace in it."""

from __future__ import annotations

import collections
import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class Snapshot:
    """Classes, attributes, children, hooks, modes and buffers of a module and all inside it."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.classes = [type(m) for m in self.modules]
        self.attributes = [dict(m.__dict__) for m in self.modules]
        self.inner = [
            (module, value, _items(value))
            for module in self.modules for value in module.__dict__.values()
            if isinstance(value, dict | list | set | collections.deque)
        ]  # fmt: skip
        self.buffers = [(b, b.detach().clone()) for b in model.buffers() if b.device.type != "meta"]

    def restore(self) -> None:
        """Puts everything back."""
        for module, cls in zip(self.modules, self.classes, strict=True):
            module.__class__ = cls
        self._restore(set())

    def restore_run(self) -> None:
        """Puts back what a run changed; lazy modules stay what the run made of them."""
        pairs = zip(self.modules, self.classes, strict=True)
        self._restore({id(m) for m, cls in pairs if type(m) is not cls})

    def _restore(self, without: set[int]) -> None:
        for module, attributes in zip(self.modules, self.attributes, strict=True):
            if id(module) not in without:
                module.__dict__.clear()
                module.__dict__.update(attributes)
        for module, value, before in self.inner:
            # Left alone unless changed: it may be a frozen subclass of dict, as in diffusers.
            if id(module) not in without and not _same_items(value, before):
                value.clear()
                (value.update if isinstance(value, dict | set) else value.extend)(before)
        for buffer, values in self.buffers:
            buffer.data.copy_(values)


@contextlib.contextmanager
def rehearsed(model: nn.Module) -> Iterator[None]:
    """Runs a module for information only: its state and random numbers are put back afterwards."""
    snapshot, restore_random = Snapshot(model), remember_random_state(model)
    try:
        yield
    finally:
        snapshot.restore_run()
        restore_random()


def remember_random_state(model: nn.Module) -> Callable[[], None]:
    """Returns a function that puts the present random state back, so that a run can be repeated.

    That is the state of torch, on the CPU and the model's GPUs, of Python and of numpy.
    """
    host, numbers = torch.get_rng_state(), random.getstate()
    others = {device: torch.cuda.get_rng_state(device) for device in _cuda_devices(model)}
    numpy_random: Any = sys.modules.get("numpy.random")
    arrays = numpy_random.get_state() if numpy_random is not None else None

    def restore() -> None:
        torch.set_rng_state(host)
        random.setstate(numbers)
        if arrays is not None:
            numpy_random.set_state(arrays)
        for device, state in others.items():
            torch.cuda.set_rng_state(state, device)

    return restore


def _cuda_devices(model: nn.Module) -> list[str]:
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({str(t.device) for t in tensors if t.device.type == "cuda"})


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Puts every module's class, attributes, children, hooks and mode back if the body raises."""
    snapshot = Snapshot(model)
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise


def _items(container: Any) -> Any:
    """What a container holds, in a plain one."""
    for kind in (dict, set):
        if isinstance(container, kind):
            return kind(container)
    return list(container)


def _same_items(now: Any, before: Any) -> bool:
    """Whether two containers hold the same objects (under the same keys) in the same order."""
    if len(now) != len(before):
        return False
    if isinstance(before, dict):
        return list(now) == list(before) and all(now[key] is v for key, v in before.items())
    return all(a is b for a, b in zip(now, before, strict=True))
