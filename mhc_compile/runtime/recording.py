"""One forward whose backward is to rebuild streams: what its tensors are computed from."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mhc_compile._torch_compat import StorageWeakRef, saving_hook
from mhc_compile.runtime.rebuilt import (
    Chain,
    Expanded,
    Given,
    Kept,
    KeptByNorm,
    Merged,
    Norm,
    Part,
    Read,
    Seen,
    Source,
    Start,
    State,
    unpack,
)

_SOURCE = "_mhc_source"
"""Attribute by which a tensor keeps its source alive."""


class Recording:
    """Hands autograd the source of a tensor to keep in place of the tensor, where there is one.

    Args:
        starts: called with the number of a chain, in the order of the forward: the places where
            its blocks begin.
    """

    def __init__(self, starts: Callable[[int, Chain], frozenset[int]]) -> None:
        self._starts = starts
        self.chains: list[Chain] = []
        self._sources: WeakValueDictionary[StorageWeakRef, Source] = WeakValueDictionary()
        self._seen: set[StorageWeakRef] = set()
        self._sublayer: tuple[Chain, int] | None = None
        self._norms: list[Norm] = []
        self._hooks: list[Any] = []

    def open(self) -> None:
        """Begins: from now on autograd asks this recording."""
        self._enter(self._pack)

    def close(self) -> None:
        """Ends."""
        while self._hooks:
            self._hooks.pop().__exit__(None, None, None)
        self._sources.clear()

    def expanded(self, x: Tensor, n: int, y: Tensor) -> None:
        """Notes that y are n copies of x."""
        self._note(y, Expanded(Chain(x, n, True), x))

    def read(self, x: Tensor, pre: Tensor, h: Tensor) -> None:
        """Notes that a sublayer's input h was read from the streams x."""
        state = self._state(x)
        self._sublayer = state.chain, state.place
        state.chain.add_layer(state.place)  # with what the read itself keeps
        self._note(h, Read(state, Given(pre)))

    def merged(self, x: Tensor, f: Tensor, post: Tensor, res: Tensor, y: Tensor) -> None:
        """Notes that y are the streams x after a sublayer that returned f."""
        state = self._state(x)
        chain, place = state.chain, state.place + 1
        if chain not in self.chains:
            chain.starts = self._starts(len(self.chains), chain)
            self.chains.append(chain)
        chain.add_layer(place - 1)
        self._sublayer = None
        if place in chain.starts:
            self._note(y, Start(chain, place, y))
        else:
            self._note(y, Merged(chain, place, state, Given(f), Given(post), Given(res)))

    def enter_norm(self, module: nn.Module, h: Tensor) -> None:
        """Lets what a module keeps be rebuilt, if h is a sublayer's input."""
        source = self._exactly(h)
        # Not within torch.utils.checkpoint, which runs the module again itself.
        if isinstance(source, Read) and saving_hook() == self._pack:
            norm, places = Norm(source, module, h), itertools.count()
            self._norms.append(norm)
            self._enter(lambda _: KeptByNorm(norm, next(places)))

    def leave_norm(self, module: nn.Module, result: Any) -> None:
        """Ends what `enter_norm` began; `result` is None if the module failed."""
        if not self._norms or self._norms[-1].module is not module:
            return
        norm = self._norms.pop()
        self._hooks.pop().__exit__(None, None, None)
        if isinstance(result, Tensor) and self._find(result) is None:
            self._note(result, norm)

    def _enter(self, pack: Callable[[Tensor], Kept]) -> None:
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        hooks.__enter__()
        self._hooks.append(hooks)

    def _pack(self, tensor: Tensor) -> Kept:
        source = self._find(tensor)
        if source is not None and not isinstance(source, Start):
            return Part(source, tensor)
        if source is None:
            self._count(tensor)
        return Given(tensor)

    def _state(self, x: Tensor) -> State:
        state = self._find(x)
        if isinstance(state, State):
            return state if self._exactly(x) is state else Seen(state, x)
        state = Start(Chain(x.select(-2, 0), x.shape[-2], False), 0, x)
        self._note(x, state)
        return state

    def _note(self, tensor: Tensor, source: Source) -> None:
        """Remembers the source of a tensor that fills its memory; others stay unknown."""
        if not _plain(tensor) or tensor.untyped_storage().nbytes() != tensor.nbytes:
            return
        source.version, source.dtype = tensor._version, tensor.dtype
        source.layout = tensor.shape, tensor.stride()
        setattr(tensor, _SOURCE, source)
        self._sources[StorageWeakRef(tensor.untyped_storage())] = source

    def _exactly(self, tensor: Tensor) -> Source | None:
        """The source of a tensor itself, not of one that it is a view of."""
        source = self._find(tensor)
        whole = source is not None and (tensor.shape, tensor.stride()) == source.layout
        return source if whole else None

    def _find(self, tensor: Tensor) -> Source | None:
        """The source of what lies in a tensor's memory."""
        if not _plain(tensor):
            return None
        source = self._sources.get(StorageWeakRef(tensor.untyped_storage()))
        if source is None or (source.version, source.dtype) != (tensor._version, tensor.dtype):
            return None
        return source

    def _count(self, tensor: Tensor) -> None:
        """Adds what autograd keeps to the sublayer's bytes, or to those after the last one."""
        if not _plain(tensor):
            return
        storage = tensor.untyped_storage()
        reference, size = StorageWeakRef(storage), storage.nbytes()
        if reference in self._seen:
            return
        self._seen.add(reference)
        whole = tensor if tensor._base is None else tensor._base
        weight = isinstance(whole, nn.Parameter)
        if weight and (whole.grad is not None or not whole.requires_grad):
            return
        if self._sublayer is not None:
            chain, place = self._sublayer
            (chain.gradients if weight else chain.kept)[place] += size
        elif self.chains and weight:
            self.chains[-1].late += size
        elif self.chains:
            self.chains[-1].head += size


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor has a memory of its own, unlike those that wrap others."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


_open = threading.local()


def recordings() -> list[Recording | None]:
    """This thread's forwards of models in progress, outermost first; None: of one without."""
    if not hasattr(_open, "recordings"):
        _open.recordings = []
    found: list[Recording | None] = _open.recordings
    return found


def recording() -> Recording | None:
    """The recording of the innermost forward in progress, if gradients are recorded too."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    found = recordings()
    return found[-1] if found else None
