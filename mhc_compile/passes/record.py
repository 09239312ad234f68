"""Step 1, record: run the model once, eagerly, and write down its data flow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile._torch_compat import (
    TorchDispatchMode,
    WeakIdKeyDictionary,
    WeakIdRef,
    compiled_module,
    force_eager,
    no_nested_tensor_fastpath,
    tensor_leaves,
    user_source,
)
from mhc_compile.errors import ExampleInputsError
from mhc_compile.passes.call_paths import LeafPath, named_leaves
from mhc_compile.passes.flow import NOOPS, Flow, Op, is_heavy_name
from mhc_compile.passes.trace_patches import inlined_script_functions
from mhc_compile.runtime.guards import line_of_hook

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
CREATORS = frozenset({
    "arange", "zeros", "full", "ones", "empty", "zeros_like", "ones_like", "full_like", "rand",
    "randn", "rand_like", "randn_like", "empty_like", "scalar_tensor",
})  # fmt: skip


@dataclass
class Call:
    """One call of a module: which operations made the tensors that went in and came out.

    `changed_by` are the lines of its forward hooks that returned something.
    """

    module: nn.Module
    path: tuple[tuple[str, int], ...] = ()
    inputs: dict[LeafPath, int] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    changed_by: list[str] = field(default_factory=list)


@dataclass
class Recording:
    """The data flow of one forward, the module calls in it, and what the model returned.

    `reduced` tells that something was computed with fewer than 32 bits.
    """

    flow: Flow
    calls: dict[tuple[str, int], Call]
    result: Any
    reduced: bool = False


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flow = Flow()
        self.calls: dict[tuple[str, int], Call] = {}
        self.stack: list[tuple[str, int]] = []
        self.names = {id(m): name for name, m in model.named_modules()}
        self.counts: dict[int, int] = {}
        self.node_of: Any = WeakIdKeyDictionary(ref_type=WeakIdRef)
        self.written: dict[int, int] = {}
        self.reduced = False
        self.fixed: dict[int, tuple[int, ...]] = {id(t): () for t in model.buffers()}
        self.fixed |= {id(t): (id(t),) for t in model.parameters()}
        # What is made of parameters alone, with the parameters it is made of.
        self.fixed_values: Any = WeakIdKeyDictionary(ref_type=WeakIdRef)

    def source_of(self, tensor: Tensor) -> int | None:
        """The operation that made a tensor; None for numbers, biases and what is made of them."""
        index = self.node_of.get(tensor)
        if index is not None:
            written = self.written.get(_storage(tensor), -1)
            return index if written <= index else self._overwritten(tensor, index, written)
        if tensor.dim() == 0:  # a number that became a tensor
            self.fixed_values.setdefault(tensor, ())
        weights = self.weights_of(tensor)
        if weights is not None and tensor.dim() < 2:
            return None
        op = Op(len(self.flow.ops), "input" if weights is None else "parameter", (),
                shape=tuple(tensor.shape), is_float=tensor.is_floating_point(),
                weights=weights or (), fixed=weights is not None)  # fmt: skip
        self.flow.ops.append(op)
        self.node_of[tensor] = op.index
        return op.index

    def _overwritten(self, tensor: Tensor, before: int, written: int) -> int:
        """A tensor after a write in place, which may have gone through a view of a part of it."""
        write = self.flow.ops[written]
        if write.shape == tuple(tensor.shape):
            return written
        op = replace(write, index=len(self.flow.ops), name="overwritten", inputs=(before, written),
                     operands=(before, written), shape=tuple(tensor.shape),
                     shapes=(tuple(tensor.shape), write.shape), weights=())  # fmt: skip
        self.flow.ops.append(op)
        self.node_of[tensor] = op.index
        return op.index

    def weights_of(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The parameters of which a fixed value is made; None if it depends on the inputs."""
        known = self.fixed.get(id(tensor))
        return self.fixed_values.get(tensor) if known is None else known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = tensor_leaves((args, dict(kwargs)))
        operands = tuple(self.source_of(t) for t in tensors)
        shapes = tuple(tuple(t.shape) for t in tensors)
        out = func(*args, **kwargs)
        results = tensor_leaves(out)
        self.reduced |= any(t.is_floating_point() and t.element_size() < 4 for t in results)
        if not results:
            return out
        name = func._schema.name.split("::")[1]
        inputs = tuple(i for i in operands if i is not None)
        made_of = [self.weights_of(t) for t in tensors]
        weights = tuple(w for part in made_of for w in part or ())
        fixed = None not in made_of and name not in CREATORS
        if fixed:
            for tensor in results:
                self.fixed_values[tensor] = weights
            if not inputs:
                return out
        op = Op(
            len(self.flow.ops), name, inputs, operands, shapes, tuple(results[0].shape),
            results[0].is_floating_point(), heavy=is_heavy_name(name),
            noop=name in NOOPS or _is_identity(name, args),
            path=tuple(self.stack), source=user_source(),
            weights=weights, fixed=fixed, detail=_detail(name, args, kwargs, tensors),
        )  # fmt: skip
        self.flow.ops.append(op)
        for tensor in results:
            self.node_of[tensor] = op.index
            if func._schema.is_mutable and not any(r is t for t in tensors for r in results[1:]):
                self.written[_storage(tensor)] = op.index
        return out

    def call_module(
        self, call: Callable[..., Any], module: nn.Module, args: Args, kwargs: Kwargs
    ) -> Any:
        """Runs one module call inside its entry of the stack."""
        name = self.names.get(id(module))
        if name is None:
            return call(module, *args, **kwargs)
        self.counts[id(module)] = number = self.counts.get(id(module), 0) + 1
        self.stack.append((name, number))
        try:
            record = self.calls[name, number] = Call(module, tuple(self.stack))
            for path, leaf in named_leaves(type(module).forward, args, kwargs):
                if isinstance(leaf, Tensor) and (index := self.source_of(leaf)) is not None:
                    record.inputs[path] = index
            with _noted_results(module, record.changed_by):
                out = call(module, *args, **kwargs)
            found = [self.source_of(t) for t in tensor_leaves(out)]
            record.outputs = [i for i in found if i is not None]
            return out
        finally:
            self.stack.pop()


def record_forward(model: nn.Module, args: Args, kwargs: Kwargs) -> Recording:
    """Runs the model once without gradients and records its data flow.

    Args:
        model: any module; it runs in the mode it is in.
        args: positional example inputs.
        kwargs: keyword example inputs.

    Returns:
        The finished flow graph, the module calls and the model's result.

    Raises:
        ExampleInputsError: the model's own forward failed on these inputs.
    """
    recorder = _Recorder(model)
    with torch.no_grad(), no_nested_tensor_fastpath(), force_eager():
        with patched_module_call(recorder.call_module), inlined_script_functions(), recorder:
            try:
                result = model(*args, **kwargs)
            except Exception as error:
                raise ExampleInputsError(
                    f"{type(model).__name__} failed on the example inputs "
                    f"({type(error).__name__}: {error}); pass example_inputs=(args tuple, kwargs "
                    "dict) with which model(*args, **kwargs) works"
                ) from error
        flow = recorder.flow
        flow.outputs = {
            i for t in tensor_leaves(result) if (i := recorder.node_of.get(t)) is not None
        }
    flow.finish()
    return Recording(flow, recorder.calls, result, recorder.reduced)


@contextlib.contextmanager
def _noted_results(module: nn.Module, lines: list[str]) -> Iterator[None]:
    """Notes which forward hooks and pre-hooks of a module return something."""

    def noting(hook: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            result = hook(*args, **kwargs)
            if result is not None:
                lines.append(line_of_hook(hook))
            return result

        return noted

    before = [(hooks, dict(hooks)) for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    for hooks, plain in before:
        hooks.update({key: noting(hook) for key, hook in plain.items()})
    try:
        yield
    finally:
        for hooks, plain in before:
            hooks.update({key: hook for key, hook in plain.items() if key in hooks})


_calls: list[Callable[..., Any]] = []
"""What `nn.Module.__call__` does now, last, and what it did before."""


@contextlib.contextmanager
def patched_module_call(handler: Callable[..., Any]) -> Iterator[None]:
    """Sends every `nn.Module.__call__` through `handler(original_call, module, args, kwargs)`.

    The class is patched once for all handlers: Python has to go through every class of modules.
    """
    first, before = not _calls, nn.Module.__call__
    original = before if first else _calls[-1]

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = compiled_module(module)
        return original(module, *args, **kwargs) if inner is None else inner(*args, **kwargs)

    def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return _calls[-1](module, *args, **kwargs)

    _calls.append(lambda module, *args, **kwargs: handler(call, module, args, kwargs))
    if first:
        nn.Module.__call__ = __call__  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        _calls.pop()
        if first:
            nn.Module.__call__ = before  # type: ignore[method-assign]


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return -id(tensor)


def _is_identity(name: str, args: Args) -> bool:
    """Whether 0 is added or 1 multiplied; Python's sum() starts with 0 + x."""
    other = args[1] if len(args) > 1 else None
    if isinstance(other, Tensor):
        number = other.dim() == 0 and other.device.type == "cpu" and not other.requires_grad
        other = other.item() if number and other.numel() else None
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1}.get(name)
    return neutral is not None and isinstance(other, int | float) and other == neutral


def _detail(name: str, args: Args, kwargs: Kwargs, tensors: list[Tensor]) -> object:
    """What the channel check needs: axes of a permutation, sizes that an operation works on."""
    if name == "permute":
        return tuple(args[1])
    if name in ("transpose", "swapaxes"):
        return (args[1], args[2])
    if name == "native_layer_norm":
        return tuple(args[1])
    if name in ("add", "add_", "sub"):
        return kwargs.get("alpha", 1)
    if name in ("mean", "var_mean", "var") and len(args) > 1:
        return args[1]
    if is_heavy_name(name) and tensors:
        return tuple(tuple(t.shape) for t in tensors)
    return None
