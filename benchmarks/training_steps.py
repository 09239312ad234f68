"""Training steps of one model under several versions: built, checked, timed, memory measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timing import relative
from torch import Tensor
from training_models import Shape, WithLoss, build, small

import mhc_compile as mc
from mhc_compile.backend import mhc

Call = Callable[[Tensor, Tensor], Tensor]
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""Largest relative error (norms) beyond twice that of eager execution in the same dtype."""


@dataclass(frozen=True)
class Version:
    """How a model runs.

    Attributes:
        connection: "plain", "hc" or "mhc".
        backend: "eager", "inductor" or "mhc".
        options: of backend "mhc".
    """

    connection: str
    backend: str
    options: dict[str, Any] = field(default_factory=dict)


VERSIONS = {
    "plain": Version("plain", "inductor"),
    "mhc": Version("mhc", "mhc", {"recompute": "off"}),
    "mhc, recompute paper": Version("mhc", "mhc", {"recompute": "paper"}),
    "mhc, recompute timeline": Version("mhc", "mhc", {"recompute": "timeline"}),
    "mhc, Inductor": Version("mhc", "inductor"),
    "mhc, formulas": Version("mhc", "mhc", {"kernels": "reference", "recompute": "off"}),
    "mhc, eager": Version("mhc", "eager"),
    "hc": Version("hc", "inductor"),
}
"""By name; "mhc, formulas" has no generated kernels, "mhc, Inductor" no fused seams."""


def make_model(
    shape: Shape, connection: str, streams: int, device: torch.device, dtype: torch.dtype
) -> WithLoss:
    """A model with its connections, and with maps as after some training, not as at the start."""
    model = build(shape, device, dtype)
    if connection != "plain":
        length = min(8, shape.length)
        example = torch.randn(1, length, shape.channels, device=device, dtype=dtype)
        mc.transform(model, streams=streams, connection=connection, example_inputs=(example,))
        with torch.no_grad():
            for _, parameter in mc.mhc_parameters(model):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return WithLoss(model).train()


def failure(error: Exception) -> str:
    """A status of one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first[:200]}"


def compiled(model: WithLoss, version: Version) -> Call:
    """What calls the model."""
    if version.backend == "eager":
        return model
    if version.backend == "inductor":
        return torch.compile(model, backend="inductor", fullgraph=True)
    return torch.compile(model, backend=mhc, options=version.options, fullgraph=True)


def batch_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    size = shape.batch, shape.length, shape.channels
    x, target = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
    return x, target


def check(
    shape: Shape, versions: Mapping[str, Version], streams: int, device: torch.device,
    dtype: torch.dtype,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Compares versions with eager float64 on a small copy of the model, of two blocks.

    Returns:
        By version the relative errors of "loss", of the gradients of "weights" and of
        "connections", the same of "eager" execution in `dtype`, and "why" it is wrong, else "".
    """
    shape = replace(small(shape), length=64, batch=2, blocks=2)
    found: dict[str, dict[str, Any]] = {}
    for connection in dict.fromkeys(version.connection for version in versions.values()):
        torch.manual_seed(0)
        model = make_model(shape, connection, streams, device, dtype)
        batch = batch_of(shape, device, dtype)
        wide = copy.deepcopy(model).double()
        right = _results(wide, wide, [part.double() for part in batch])

        def errors(call: Call, model=model, batch=batch, right=right) -> dict[str, float]:
            got = _results(model, call, batch)
            return {key: relative(got[key], right[key]) for key in right}

        eager = errors(model)
        for name, version in versions.items():
            if version.connection == connection:
                try:
                    own = errors(compiled(model, version))
                except Exception as error:  # the others are worth checking
                    found[name] = {"eager": eager, "why": failure(error)}
                    continue
                wrong = [k for k in own if not own[k] <= BOUNDS[dtype] + 2 * eager[k]]
                why = ", ".join(f"{k} is off by {own[k]:.1e}" for k in wrong)
                found[name] = {**own, "eager": eager, "why": why and f"wrong: {why}"}
        torch.compiler.reset()
    return found


def _results(model: WithLoss, call: Call, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """The loss, and the gradients of the connections and of all else, each as one vector."""
    model.zero_grad()
    loss = call(*batch)
    loss.backward()
    own = _connections(model)
    grads: dict[str, list[Tensor]] = {"weights": [], "connections": []}
    for parameter in model.parameters():
        kind = "connections" if id(parameter) in own else "weights"
        if parameter.grad is not None:
            grads[kind].append(parameter.grad.double().flatten())
    model.zero_grad()
    return {"loss": loss.detach()} | {k: torch.cat(v) for k, v in grads.items() if v}


def _connections(model: WithLoss) -> set[int]:
    if not mc.is_transformed(model.blocks):
        return set()
    return {id(parameter) for _, parameter in mc.mhc_parameters(model.blocks)}


class Training:
    """One model with its optimizer, on a batch that stays the same.

    Attributes:
        model: with its loss.
        batch: inputs and targets.
        optimizer: AdamW.
    """

    def __init__(
        self, shape: Shape, connection: str, streams: int, device: torch.device,
        dtype: torch.dtype = torch.bfloat16, capturable: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.model = make_model(shape, connection, streams, device, dtype)
        self.batch = batch_of(shape, device, dtype)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, fused=True, capturable=capturable
        )

    @property
    def resident(self) -> int:
        """Bytes of parameters and of the optimizer's states."""
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        return sum(t.nbytes for t in (*self.model.parameters(), *states))

    def step(self, call: Call, mark: Callable[[], None] = lambda: None) -> None:
        """Forward, backward, `mark`, optimizer."""
        self.optimizer.zero_grad()
        call(*self.batch).backward()
        mark()
        self.optimizer.step()


class Clock:
    """Moments on the device, or of a CPU's wall clock; milliseconds between them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.moments: list[Any] = []

    def mark(self) -> None:
        """Notes a moment."""
        if self.cuda:
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def between(self, first: int, second: int) -> float:
        """Milliseconds from one moment to another, by their numbers."""
        a, b = self.moments[first], self.moments[second]
        return a.elapsed_time(b) if self.cuda else 1e3 * (b - a)


def time_steps(step: Callable[[Callable[[], None]], None], repeats: int, device: torch.device,
               ) -> list[tuple[float, float]]:  # fmt: skip
    """Milliseconds of each step until its mark and in all; steps follow each other at once."""
    clock = Clock(device)
    for _ in range(repeats):
        clock.mark()
        step(clock.mark)
        clock.mark()
    if clock.cuda:
        torch.cuda.synchronize()
    return [
        (clock.between(3 * k, 3 * k + 1), clock.between(3 * k, 3 * k + 2)) for k in range(repeats)
    ]
