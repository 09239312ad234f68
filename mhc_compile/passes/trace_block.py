"""Step 3, trace: the forward of one block as a torch.fx graph, submodules kept as calls.

The block's Python runs on proxies that carry real values. Branches and type checks therefore
take the way that the example takes, and what they depended on becomes a guard of the graph.
Sizes stay symbolic. Submodules run for real, on copies, to learn the structure of their results.
"""

from __future__ import annotations

import builtins
import contextlib
import enum
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from mhc_compile._torch_compat import (
    Source,
    force_eager,
    is_internal,
    no_nested_tensor_fastpath,
    user_frame,
    user_source,
)
from mhc_compile.errors import MHCError, TraceError
from mhc_compile.passes.call_paths import LeafPath, is_open, named_leaves, positional_names
from mhc_compile.passes.record import patched_module_call
from mhc_compile.passes.trace_patches import (
    patched_autograd_apply,
    patched_factories,
    patched_isinstance,
    protected_copy,
    side_effects_undone,
)
from mhc_compile.passes.value_proxy import Method, ValueProxy, proxies_in, unwrapped

CONSTANTS = (
    type(None), bool, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format,
    enum.Enum, type, type(Ellipsis),
)  # fmt: skip
"""Arguments of these types are part of a graph's key; all others are its inputs."""

_STATIC_ATTRIBUTES = frozenset(
    {"dtype", "device", "ndim", "layout", "is_cuda", "is_nested", "is_sparse"}
)
_AUTOGRAD_ATTRIBUTES = frozenset({"requires_grad", "grad_fn", "is_leaf", "grad"})


@dataclass
class TracedBlock:
    """A block's forward as a graph.

    `inputs` are the paths of the placeholders in order. `guards` are `(node, value, source)`:
    values on which the block's control flow depended; `inspected` tells that the code asked for
    the type of an argument that was None.
    """

    graph: fx.Graph
    inputs: dict[LeafPath, fx.Node]
    guards: list[tuple[fx.Node, Any, Source | None]] = field(default_factory=list)
    inspected: bool = False


def trace_block(
    block: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    opened: frozenset[str],
    label: str = "",
    open_names: frozenset[str] = frozenset(),
) -> TracedBlock:
    """Traces `forward(block, *args, **kwargs)`; nothing outside the graph is changed.

    Args:
        block: the owner of the residual adds.
        forward: its original, unbound forward.
        args: example positional arguments; tensors are plain, not streams.
        kwargs: example keyword arguments.
        opened: names of submodules to trace into.
        label: what messages call the block; its class's name if empty.
        open_names: arguments that are inputs of the graph even where the example has None.

    Returns:
        The graph, its inputs and guards.

    Raises:
        TraceError: the forward does something that a graph cannot hold; the message names the
            source line.
    """
    tracer = _Tracer(block, opened, label or type(block).__name__)
    with side_effects_undone(block), torch.no_grad():
        call_args, call_kwargs = tracer.add_inputs(forward, args, kwargs, open_names)
        with no_nested_tensor_fastpath(), force_eager(), tracer.active():
            try:
                out = forward(block, *call_args, **call_kwargs)
                tracer.graph.output(tracer.create_arg(out))
            except MHCError:
                raise
            except Exception as error:
                raise TraceError(
                    f"cannot trace {tracer.label} at {_error_source(error)}: "
                    f"{type(error).__name__}: {error}; rewrite that line with torch operations, "
                    "or move it into a submodule of its own"
                ) from error
    tracer.flush_index_guards()
    return TracedBlock(tracer.graph, tracer.inputs, tracer.guards, tracer.inspected)


class _RecordFunctions(TorchFunctionMode):
    """Sends torch functions to the tracer, also those without a proxy among their arguments."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.tracer.paused:
            return func(*args, **kwargs)
        proxies = proxies_in((args, kwargs))
        self.tracer.drop_index_guards(proxies)
        if proxies:
            return self.tracer.create("call_function", _public(func), args, kwargs)
        with self.tracer.pause():
            value = func(*args, **kwargs)
        if not builtins.isinstance(value, Tensor) or _is_accessor(func):
            return value
        return self.tracer.create("call_function", _public(func), args, kwargs)


class _Tracer:
    """Builds the graph of one block and computes each node's value as it goes."""

    def __init__(self, block: nn.Module, opened: frozenset[str], label: str) -> None:
        self.block = block
        self.label = label
        self.graph = fx.Graph()
        self.inputs: dict[LeafPath, fx.Node] = {}
        self.guards: list[tuple[fx.Node, Any, Source | None]] = []
        self.paused = 0
        self.inspected = False
        self.modules = {id(m): name for name, m in block.named_modules()}
        self.opened = {id(block.get_submodule(name)) for name in opened} | {id(block)}
        named = [*block.named_parameters(remove_duplicate=False),
                 *block.named_buffers(remove_duplicate=False)]  # fmt: skip
        self.tensors = {id(t): name for name, t in reversed(named)}
        self.attributes: dict[str, fx.Node] = {}
        self.proxies: dict[int, list[ValueProxy]] = {}
        self.pending: list[tuple[ValueProxy, tuple[int, int] | None, Source | None]] = []

    # --- inputs ---------------------------------------------------------------------------

    def add_inputs(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        open_names: frozenset[str],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Makes a placeholder for every argument that is not a constant, on protected copies."""
        placeholders: dict[LeafPath, fx.Node] = {}
        for path, leaf in named_leaves(forward, args, kwargs):
            if not builtins.isinstance(leaf, CONSTANTS) or is_open(path[0], leaf, open_names):
                name = "_".join(str(part) for part in path if part != "*") or "arg"
                name = name if name.isidentifier() else f"arg_{len(placeholders)}"
                placeholders[path] = self.graph.placeholder(name)
        nodes = iter(placeholders.values())
        memo: dict[int, Any] = {}

        def wrap(value: Any) -> Any:
            if type(value) in (tuple, list):
                return type(value)(wrap(v) for v in value)
            if type(value) is dict:
                return {k: wrap(v) for k, v in value.items()}
            if builtins.isinstance(value, CONSTANTS):
                return value
            return self.proxy_for(next(nodes), protected_copy(value, memo, self.label))

        def wrap_argument(name: str, value: Any) -> Any:
            return (
                self.proxy_for(next(nodes), value)
                if is_open(name, value, open_names)
                else wrap(value)
            )

        # Same order as named_leaves: parameters by position, keywords, then extra positionals.
        names = positional_names(forward)
        first = tuple(wrap_argument(n, a) for n, a in zip(names, args, strict=False))
        named = {k: wrap_argument(k, v) for k, v in kwargs.items()}
        rest = tuple(wrap(a) for a in args[len(names) :])
        self.inputs = placeholders
        return first + rest, named

    # --- tracing --------------------------------------------------------------------------

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Patches module calls, autograd functions and isinstance while the block runs."""
        with (
            patched_module_call(self.call_module),
            patched_isinstance(),
            patched_factories(self),
            patched_autograd_apply(self),
            _RecordFunctions(self),
        ):
            yield

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Lets real values through: nothing is recorded."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def call_module(
        self,
        call: Callable[..., Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Traces into opened modules, records calls of the others."""
        if self.paused:
            return module.forward(*args, **kwargs)  # hooks saw the real call, not this rehearsal
        if id(module) in self.opened:
            return call(module, *args, **kwargs)
        name = self.modules.get(id(module))
        if name is None:
            raise TraceError(
                f"{self.label} calls a {type(module).__name__} at {_here()} that is not one of its "
                "submodules; register it on the block"
            )
        return self.create("call_module", name, args, kwargs)

    def create(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *_: Any,
        **__: Any,
    ) -> Any:
        """Adds a node, computes its value, and returns the wrapped value."""
        if self.paused:
            return self._evaluate(kind, target, unwrapped(args), unwrapped(kwargs))
        node = self.graph.create_node(
            kind, target, self.create_arg(tuple(args)), self.create_arg(dict(kwargs))
        )
        node.meta["source"] = user_source()
        with self.pause():
            value = self._evaluate(kind, target, unwrapped(tuple(args)), unwrapped(dict(kwargs)))
        if _is_in_place(target, kwargs):
            node.meta["in_place"] = True
            self._update_aliases(node, args)
        return self.wrap(node, value)

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_function":
            return target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return self.block.get_submodule(target).forward(*args, **kwargs)

    def _update_aliases(self, node: fx.Node, args: tuple[Any, ...]) -> None:
        """After an in-place write every name of that tensor stands for the new value."""
        first = next((a for a in args if type(a) is ValueProxy), None)
        if first is not None:
            node.meta["value"] = first._mhc_value
            for alias in self.proxies.get(id(first._mhc_value), []):
                alias._mhc_node = node

    def proxy_for(self, node: fx.Node, value: Any) -> ValueProxy:
        """A proxy of a node whose value is known."""
        node.meta["value"] = value
        proxy = ValueProxy(node, self, value)
        self.proxies.setdefault(id(value), []).append(proxy)
        return proxy

    def wrap(self, node: fx.Node, value: Any) -> Any:
        """Wraps a result: containers stay containers, constants stay constants."""
        if type(value) in (tuple, list, torch.Size):
            items = [self._item(node, i, v) for i, v in enumerate(value)]
            return items if type(value) is list else tuple(items)
        if builtins.isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._item(node, i, v) for i, v in enumerate(value)))
        if type(value) is dict:
            return {k: self._item(node, k, v) for k, v in value.items()}
        if builtins.isinstance(value, CONSTANTS) and type(value) is not bool:
            return value
        return self.proxy_for(node, value)

    def _item(self, node: fx.Node, key: Any, value: Any) -> Any:
        if builtins.isinstance(value, CONSTANTS):
            return value
        item = self.graph.call_function(operator.getitem, (node, key))
        item.meta["source"] = node.meta.get("source")
        return self.wrap(item, value)

    def read_attribute(self, proxy: ValueProxy, name: str) -> Any:
        """Records `proxy.name`; dtype, device and the like are returned as constants."""
        is_tensor = builtins.isinstance(proxy._mhc_value, Tensor)
        if is_tensor and name in _AUTOGRAD_ATTRIBUTES and not self.paused:
            raise TraceError(
                f"{self.label} reads .{name} of a tensor at {_here()}; a graph cannot depend on "
                "autograd's state"
            )
        with self.pause():
            value = getattr(proxy._mhc_value, name)
        if self.paused:
            return value
        if callable(value) and not builtins.isinstance(value, Tensor | nn.Module):
            return Method(proxy, name)
        node = self.graph.call_function(getattr, (proxy._mhc_node, name))
        node.meta["source"] = user_source()
        if is_tensor and name in _STATIC_ATTRIBUTES:
            if proxy._mhc_node.op != "placeholder":  # a placeholder's are part of the graph's key
                self.guard(node, value)
            return value
        return self.wrap(node, value)

    def create_arg(self, a: Any) -> Any:
        """Turns an argument into what a node can hold."""
        if type(a) is ValueProxy:
            return a._mhc_node
        if builtins.isinstance(a, Tensor | nn.Module):
            return self._attribute_node(a)
        if builtins.isinstance(a, tuple) and hasattr(a, "_fields"):
            return type(a)(*(self.create_arg(v) for v in a))
        if type(a) in (tuple, list, torch.Size):
            items = [self.create_arg(v) for v in a]
            return items if type(a) is list else tuple(items)
        if type(a) is dict:
            return {k: self.create_arg(v) for k, v in a.items()}
        if type(a) is slice:
            return slice(*(self.create_arg(v) for v in (a.start, a.stop, a.step)))
        if builtins.isinstance(a, dict) and proxies_in(a):  # e.g. a model output
            node = self.graph.call_function(
                type(a), (), {k: self.create_arg(v) for k, v in a.items()}
            )
            node.meta["source"] = user_source()
            return node
        if proxies_in(a) or not (
            builtins.isinstance(a, CONSTANTS) or type(a) in (int, float, complex, range)
        ):
            raise TraceError(
                f"{self.label} passes a {type(a).__name__} at {_here()} that a torch.fx graph "
                "cannot hold; pass tensors, numbers, strings, and tuples, lists or dicts of them"
            )
        return a

    def _attribute_node(self, a: Tensor | nn.Module) -> fx.Node:
        name = (self.tensors if builtins.isinstance(a, Tensor) else self.modules).get(id(a))
        if not name:
            raise TraceError(
                f"{self.label} uses a {type(a).__name__} at {_here()} that is neither an argument "
                "of its forward nor one of its parameters, buffers or submodules; register it"
            )
        if name not in self.attributes:
            with self.graph.inserting_before(self._first_node()):
                self.attributes[name] = self.graph.get_attr(name)
            self.attributes[name].meta["value"] = a
        return self.attributes[name]

    def _first_node(self) -> fx.Node | None:
        return next((n for n in self.graph.nodes if n.op != "placeholder"), None)

    # --- guards ---------------------------------------------------------------------------

    def guard(self, node: fx.Node, value: Any) -> None:
        """Notes that the graph holds only while `node` has this value."""
        if not any(n is node for n, _, _ in self.guards):
            self.guards.append((node, value, user_source(3)))

    def specialised(self, proxy: ValueProxy, what: str) -> Any:
        """The value of a number that Python needs to know."""
        if builtins.isinstance(proxy._mhc_value, Tensor):
            self.fail_on_data(what)
        self.guard(proxy._mhc_node, proxy._mhc_value)
        return proxy._mhc_value

    def index_of(self, proxy: ValueProxy) -> int:
        """`__index__`: a guard, unless it only was torch looking at an argument's type."""
        if builtins.isinstance(proxy._mhc_value, Tensor):
            self.fail_on_data("an index or a size")
        if not self.paused:
            self.pending.append((proxy, _position(), user_source()))
        return operator.index(proxy._mhc_value)

    def drop_index_guards(self, proxies: list[ValueProxy]) -> None:
        """Torch's argument parser asked for `__index__` in the very call that now is recorded."""
        here = _position()
        self.pending = [
            entry for entry in self.pending
            if not (entry[1] == here and any(entry[0] is p for p in proxies))
        ]  # fmt: skip

    def flush_index_guards(self) -> None:
        """Makes guards of the `__index__` calls that were real."""
        for proxy, _, source in self.pending:
            if not any(n is proxy._mhc_node for n, _, _ in self.guards):
                self.guards.append((proxy._mhc_node, proxy._mhc_value, source))
        self.pending.clear()

    def fail_on_data(self, what: str) -> None:
        """Control flow that depends on tensor values cannot be a graph."""
        raise TraceError(
            f"{self.label} takes {what} of a tensor at {_here()}, so its control flow depends on "
            "data; move that code into a submodule that does not hold the residual add, or leave "
            "the block out with filter_fn"
        )


def _public(func: Any) -> Any:
    """The plain operator for a tensor's dunder, which reads better in generated code."""
    name = getattr(func, "__name__", "")
    if getattr(torch.Tensor, name, None) is func:
        return {"add": torch.add, "mul": torch.mul, "sub": torch.sub, "div": torch.div}.get(
            name, func
        )
    return func


def _is_accessor(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"


def _is_in_place(target: Any, kwargs: Mapping[str, Any]) -> bool:
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    return (
        name in ("setitem", "__setitem__", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow",
                 "imatmul", "iand", "ior")
        or kwargs.get("inplace") is True
        or kwargs.get("out") is not None
    )  # fmt: skip


def _position() -> tuple[int, int] | None:
    frame = user_frame(2)
    return (id(frame), frame.f_lasti) if frame is not None else None


def _here() -> str:
    source = user_source(3)
    return f"{source[0]}:{source[1]}" if source else "an unknown line"


def _error_source(error: BaseException) -> str:
    """The innermost line of user code in a traceback."""
    where = "an unknown line"
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if not is_internal(filename):
            where = f"{filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where
