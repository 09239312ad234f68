"""`set_recompute`: recompute plans in eager execution."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.errors import ConfigError, NotTransformedError
from mhc_compile.runtime.modules import HyperConnection
from mhc_compile.runtime.rebuilt import Chain
from mhc_compile.runtime.recording import Recording, recording, recordings
from mhc_compile.scheduler import check_blocks, solve_recompute
from mhc_compile.scheduler.choose_plan import (
    Choice,
    Recompute,
    Sizes,
    check_recompute,
    choose_plan,
)

_ATTRIBUTE = "_mhc_recompute"
MANY = 1024
"""Sublayers that get blocks of a given size before the first forward told how many there are."""


class EagerRecompute:
    """The hooks of a model that rebuilds streams in its backward.

    Attributes:
        recompute: as given to `set_recompute`, as is `memory_budget`.
        connections: how many there are, the first guess at a chain's length.
        choices: of each chain, in the order of the forward, since the first one has run.
    """

    def __init__(self, recompute: Recompute, memory_budget: int | None, connections: int) -> None:
        self.recompute, self.memory_budget = recompute, memory_budget
        self.connections = connections
        self.choices: list[Choice] = []
        self.sizes: list[Sizes] = []
        self.handles: list[Any] = []

    def before_forward(self, model: nn.Module, args: Any) -> None:
        """Starts a recording."""
        if torch.compiler.is_compiling():
            return
        recordings().append(Recording(self._starts) if torch.is_grad_enabled() else None)
        if (opened := recordings()[-1]) is not None:
            opened.open()

    def after_forward(self, model: nn.Module, args: Any, result: Any) -> None:
        """Ends it, and plans the next one by what it has seen."""
        if torch.compiler.is_compiling() or not recordings():
            return
        closed = recordings().pop()
        if closed is not None:
            closed.close()
            if result is not None:
                self._learn(model, closed)

    def before_norm(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Rebuilds a norm too, where it gets a sublayer's input and nothing else."""
        noted = recording()
        if noted is not None and not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
            noted.enter_norm(module, args[0])

    def after_norm(self, module: nn.Module, args: Any, result: Any) -> None:
        """Ends that."""
        if (noted := recording()) is not None:
            noted.leave_norm(module, result)

    def _starts(self, number: int, chain: Chain) -> frozenset[int]:
        value = self.recompute
        if number < len(self.choices):
            blocks = self.choices[number].block_sizes
        elif isinstance(value, str):  # "timeline" and "budget" need to know first what F keeps
            blocks = solve_recompute(self.connections, chain.streams).block_sizes
        else:
            blocks = value if isinstance(value, tuple) else check_blocks(value, MANY)[0]
        return frozenset(accumulate(blocks[:-1]))

    def _learn(self, model: nn.Module, forward: Recording) -> None:
        sizes = [chain.sizes() for chain in forward.chains]
        for number, now in enumerate(sizes):
            if number < len(self.sizes) and self.sizes[number] == now:
                continue
            try:
                choice = choose_plan(self.recompute, now, self.memory_budget)
            except ConfigError as error:
                raise ConfigError(
                    f"recompute={self.recompute!r} does not fit stream {number} of "
                    f"{type(model).__name__}, which has {now.layers} sublayers: {error}"
                ) from None
            self.choices[number : number + 1] = [choice]
        self.sizes = sizes


def set_recompute(
    model: nn.Module, recompute: Any = "paper", *, memory_budget: int | None = None
) -> nn.Module:
    """Lets a model's backward rebuild its streams instead of keeping them, without torch.compile.

    Of each block of sublayers the first state x_l0 is kept, and everything that F keeps. The other
    states, the sublayers' inputs and, where it is a module, their norm are computed again, when
    the backward first needs one of a block; F, projections and Sinkhorn-Knopp never. Gradients are
    the same bit by bit. (Section 4.3.2 of arXiv 2512.24880.)

    The first forward tells how many sublayers there are and, for "timeline" and "budget", what
    they keep; until then `recompute` is applied to the number of connections, by "paper".
    Compiled calls follow `options={"recompute": ...}` of the backend instead.

    Args:
        model: with hyper-connections of more than one stream; hooks are added to it and its norms.
        recompute: "paper", "timeline", "budget", a block size in sublayers, or the sizes of all
            blocks; "off" ends it.
        memory_budget: for "budget", the bytes that the activations of one forward may need.

    Returns:
        The same model.

    Raises:
        ConfigError: an argument makes no sense.
        NotTransformedError: the model has no such connections.

    Example:
        >>> import mhc_compile as mc
        >>> set_recompute(nn.Sequential(mc.HyperConnection(8))) is not None
        True
    """
    recompute = check_recompute(recompute, memory_budget)
    connections = sum(isinstance(m, HyperConnection) and m.streams > 1 for m in model.modules())
    if not connections:
        raise NotTransformedError(
            f"{type(model).__name__} has no hyper-connections of several streams to recompute; "
            "call mhc_compile.transform(model) first"
        )
    before = eager_recompute(model)
    if before is not None:
        for handle in before.handles:
            handle.remove()
        delattr(model, _ATTRIBUTE)
    if recompute == "off":
        return model
    hooks = EagerRecompute(recompute, memory_budget, connections)
    handles = hooks.handles
    for module in model.modules():
        if _may_be_norm(module):
            handles.append(module.register_forward_pre_hook(hooks.before_norm, with_kwargs=True))
            handles.append(module.register_forward_hook(hooks.after_norm, always_call=True))
    handles.append(model.register_forward_pre_hook(hooks.before_forward))
    handles.append(model.register_forward_hook(hooks.after_forward, always_call=True))
    setattr(model, _ATTRIBUTE, hooks)
    return model


def eager_recompute(model: nn.Module) -> EagerRecompute | None:
    """What `set_recompute` has added to a model."""
    found: EagerRecompute | None = getattr(model, _ATTRIBUTE, None)
    return found


def _may_be_norm(module: nn.Module) -> bool:
    """A module without parts, state and hooks whose parameters are vectors at most.

    What it gets decides: it is a norm if that is a sublayer's input.
    """
    parameters = list(module.parameters(recurse=False))
    plain = not list(module.children()) and not list(module.buffers(recurse=False))
    hooked = module._forward_hooks or module._forward_pre_hooks
    vectors = all(p.dim() <= 1 for p in parameters)
    norm = bool(parameters) or hasattr(module, "normalized_shape")
    return plain and not hooked and vectors and norm and not isinstance(module, HyperConnection)
