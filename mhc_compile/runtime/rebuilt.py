"""Tensors that a backward computes again from what it has, instead of keeping them.

A `Source` says how. It lives as long as something refers to it: the tensor itself during the
forward, then what autograd keeps in the tensor's place, and the sources that are computed from it.
So the states of a block are there from their first use in the backward to their last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhc_compile.runtime import ops as _ops  # noqa: F401  # registers torch.ops.mhc
from mhc_compile.runtime.replay import autocast_of, replay
from mhc_compile.scheduler.choose_plan import Sizes


class Chain:
    """The sublayers that follow each other on one stream, in one forward.

    Attributes:
        streams: n.
        unit: bytes of one stream.
        starts: the places of the states that are kept.
        kept: bytes that autograd keeps of each sublayer so far, but for the states.
        head: bytes that it keeps after the last sublayer.
        first: bytes of what is kept for x_0.
        gradients: bytes of the gradients that the weights of each sublayer do not have yet.
        late: those of what comes after the last sublayer.
    """

    def __init__(self, x: Tensor, streams: int, expanded: bool) -> None:
        self.streams, self.unit = streams, x.numel() * x.element_size()
        self.first = self.unit if expanded else streams * self.unit
        self.starts: frozenset[int] = frozenset()
        self.kept: list[int] = []
        self.gradients: list[int] = []
        self.head = self.late = 0

    @property
    def layers(self) -> int:
        """The number of sublayers so far."""
        return len(self.kept)

    def add_layer(self, place: int) -> None:
        """Makes room for sublayer `place`, to which belongs what was kept since the one before."""
        while self.layers <= place:
            self.kept.append(self.head)
            self.gradients.append(self.late)
            self.head = self.late = 0

    def sizes(self) -> Sizes:
        """What the plan needs to know."""
        state = self.streams * self.unit
        # Beside the head's: the streams' gradients after and before a sublayer.
        flowing = self.late + 2 * state
        return Sizes(
            self.streams, self.unit, tuple(self.kept), self.head, state, self.first,
            tuple(self.gradients), flowing,
        )  # fmt: skip


class Given:
    """A tensor that is kept; it must not have been changed in place when it is needed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version

    def value(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was changed in place.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor that the backward needs was changed in place after the forward: shape "
                f"{list(self.tensor.shape)}, version {self.tensor._version}, expected "
                f"{self.version}; change a copy of it"
            )
        return self.tensor


class Source:
    """A tensor that `compute` makes again from `needs`, once.

    `version`, `dtype` and `layout` (shape and strides) are those of the forward's tensor.
    """

    def __init__(self, *needs: Given | Source) -> None:
        self.needs = needs
        self.version, self.dtype = 0, torch.float32
        self.layout: tuple[torch.Size, tuple[int, ...]] = (torch.Size(), ())
        self._value: Tensor | None = None

    def compute(self, *values: Tensor) -> Tensor:
        """What the forward did."""
        raise NotImplementedError

    def value(self) -> Tensor:
        """The tensor, computed now if it is not there."""
        waiting: list[Source] = [self]
        while waiting:  # a loop, because blocks may be longer than Python's stack
            source = waiting[-1]
            missing = [
                need for need in source.needs if isinstance(need, Source) and need._value is None
            ]
            if missing:
                waiting += missing
                continue
            if source._value is None:
                with torch.no_grad():
                    source._value = source.compute(*(need.value() for need in source.needs))
            waiting.pop()
        assert self._value is not None
        return self._value


class State(Source):
    """Streams `[..., n, C]`.

    Args:
        chain: the sublayers that they belong to.
        place: how many sublayers come before.
        needs: what they are computed from.
    """

    def __init__(self, chain: Chain, place: int, *needs: Given | Source) -> None:
        super().__init__(*needs)
        self.chain, self.place = chain, place


class Start(State):
    """x_l0, where a block begins: kept."""

    def __init__(self, chain: Chain, place: int, x: Tensor) -> None:
        super().__init__(chain, place, Given(x))

    def compute(self, *values: Tensor) -> Tensor:
        """There is nothing to do."""
        return values[0]


class Expanded(State):
    """x_0 of the embedding: n copies of it."""

    def __init__(self, chain: Chain, x: Tensor) -> None:
        super().__init__(chain, 0, Given(x))

    def compute(self, *values: Tensor) -> Tensor:
        """Copies the embedding."""
        copies: Tensor = torch.ops.mhc.expand(*values, self.chain.streams)
        return copies


class Merged(State):
    """The streams after a sublayer, of those before, its result, `post` and `res`."""

    def compute(self, *values: Tensor) -> Tensor:
        """Merges the result into the streams."""
        merged: Tensor = torch.ops.mhc.post_res(*values)
        return merged


class Seen(State):
    """Streams that are a part of others: x[:, 1:], say."""

    def __init__(self, state: State, x: Tensor) -> None:
        super().__init__(state.chain, state.place, state)
        self.part = Part(state, x)

    def compute(self, *values: Tensor) -> Tensor:
        """Looks at the others' memory."""
        return self.part.value()


class Read(Source):
    """A sublayer's input h, of the streams and `pre`."""

    def compute(self, *values: Tensor) -> Tensor:
        """Mixes the streams."""
        h: Tensor = torch.ops.mhc.pre(*values)
        return h


class Norm(Source):
    """What a norm's module makes of h, and what it keeps for its own backward.

    Args:
        h: what it gets.
        module: the norm; what it computes must not depend on anything else that changes.
        like: h as the forward has it.
    """

    def __init__(self, h: Source, module: nn.Module, like: Tensor) -> None:
        super().__init__(h)
        self.module, self.requires_grad = module, like.requires_grad
        self.autocast = autocast_of([like.device.type])
        self.kept: list[Tensor] = []

    def compute(self, *values: Tensor) -> Tensor:
        """Runs the norm again; what its operators keep is noted in order."""
        leaf = values[0].detach().requires_grad_(self.requires_grad)
        # Not by a call of the module, whose hooks belong to the forward.
        result, self.kept = replay(self.module.forward, leaf, autocast=self.autocast)
        again: Tensor = result.detach()
        return again


class KeptByNorm:
    """The tensor number `place` that the operators of a norm keep."""

    def __init__(self, norm: Norm, place: int) -> None:
        self.norm, self.place = norm, place

    def value(self) -> Tensor:
        """The tensor, from another run of the norm if need be."""
        self.norm.value()
        return self.norm.kept[self.place]


class Part:
    """A tensor on the memory of a source's tensor, such as a view of it."""

    def __init__(self, source: Source, tensor: Tensor) -> None:
        self.source = source
        self.place = tensor.shape, tensor.stride(), tensor.storage_offset()

    def value(self) -> Tensor:
        """The same part of the tensor as computed now."""
        shape, stride, offset = self.place
        whole = self.source.value()
        return whole.as_strided(shape, stride, offset + whole.storage_offset())


Kept = Given | Part | KeptByNorm
Pack = Callable[[Tensor], Kept]


def unpack(kept: Kept) -> Tensor:
    """The second of autograd's hooks for saved tensors."""
    return kept.value()
