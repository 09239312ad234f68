"""Step 3, trace: the forward of one block as a torch.fx graph, submodules kept as calls.

The block's Python runs on proxies that carry real values. Branches and type checks therefore
take the way that the example takes, and what they depended on becomes a guard of the graph.
Sizes stay symbolic. Submodules run for real, on copies, to learn the structure of their results.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import enum
import functools
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
from mhc_compile.passes.flow import ADDS
from mhc_compile.passes.record import patched_module_call
from mhc_compile.runtime.guards import check_value

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
    with _side_effects_undone(block), torch.no_grad():
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


class ValueProxy:
    """Stands for a node's result in the traced code and knows its value in the example.

    Its own fields have names that no value's attribute has, so that `proxy.x` is always the
    value's `x`.
    """

    def __init__(self, node: fx.Node, tracer: _Tracer, value: Any) -> None:
        self._mhc_node = node
        self._mhc_tracer = tracer
        self._mhc_value = value

    def __getattr__(self, name: str) -> Any:
        return self._mhc_tracer.read_attribute(self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Records a call of the value itself."""
        return self._mhc_tracer.create("call_method", "__call__", (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Lets torch's argument parser accept proxies; `_RecordFunctions` comes first."""
        tracer = _proxies((args, kwargs or {}))[0]._mhc_tracer
        return tracer.create("call_function", func, args, kwargs or {})

    def __bool__(self) -> bool:
        tracer = self._mhc_tracer
        if type(self._mhc_value) is not bool:
            if builtins.isinstance(self._mhc_value, Tensor):
                tracer.fail_on_data("bool()")
            return bool(tracer.create("call_function", operator.truth, (self,), {}))
        tracer.guard(self._mhc_node, self._mhc_value)
        return self._mhc_value

    def __index__(self) -> int:
        return self._mhc_tracer.index_of(self)

    def __int__(self) -> int:
        return int(self._mhc_tracer.specialised(self, "int()"))

    def __float__(self) -> float:
        return float(self._mhc_tracer.specialised(self, "float()"))

    def __len__(self) -> int:
        length = self._mhc_tracer.create("call_function", len, (self,), {})
        return int(self._mhc_tracer.specialised(length, "len()"))

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, i) for i in range(len(self))])  # type: ignore[call-overload]

    def __contains__(self, item: Any) -> bool:
        return bool(self._mhc_tracer.create("call_function", operator.contains, (self, item), {}))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._mhc_tracer.create("call_function", operator.setitem, (self, key, value), {})

    def __repr__(self) -> str:
        return f"ValueProxy({self._mhc_node.name})"

    def __format__(self, spec: str) -> str:
        return format(self._mhc_value, spec)

    def __hash__(self) -> int:
        return id(self)


def _operator(function: Callable[..., Any], reflected: bool = False) -> Callable[..., Any]:
    def method(self: ValueProxy, *others: Any) -> Any:
        args = (*others, self) if reflected else (self, *others)
        return self._mhc_tracer.create("call_function", function, args, {})

    return method


_REFLECTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "pow", "and", "or",
              "xor", "lshift", "rshift")  # fmt: skip
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imatmul", "ipow", "iand", "ior")
_OTHERS = ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "invert", "getitem")
for _name in (*_REFLECTED, *_IN_PLACE, *_OTHERS):
    setattr(ValueProxy, f"__{_name}__", _operator(getattr(operator, f"__{_name}__")))
for _name in _REFLECTED:
    setattr(ValueProxy, f"__r{_name}__", _operator(getattr(operator, f"__{_name}__"), True))
ValueProxy.__abs__ = _operator(abs)  # type: ignore[attr-defined]


@dataclass
class _Method:
    """A method of a proxied value, looked up and not yet called."""

    owner: ValueProxy
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner._mhc_tracer.create("call_method", self.name, (self.owner, *args), kwargs)


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
        proxies = _proxies((args, kwargs))
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
            return self.proxy_for(next(nodes), _protected_copy(value, memo, self.label))

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
            _patched_isinstance(),
            _patched_factories(self),
            _patched_autograd_apply(self),
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
            return self._evaluate(kind, target, _unwrap(args), _unwrap(kwargs))
        node = self.graph.create_node(
            kind, target, self.create_arg(tuple(args)), self.create_arg(dict(kwargs))
        )
        node.meta["source"] = user_source()
        with self.pause():
            value = self._evaluate(kind, target, _unwrap(tuple(args)), _unwrap(dict(kwargs)))
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
            return _Method(proxy, name)
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
        if builtins.isinstance(a, dict) and _proxies(a):  # e.g. a model output
            node = self.graph.call_function(
                type(a), (), {k: self.create_arg(v) for k, v in a.items()}
            )
            node.meta["source"] = user_source()
            return node
        if _proxies(a) or not (
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


def add_guards(traced: TracedBlock) -> None:
    """Writes the guards into the graph.

    Those that depend on inputs alone go first, so that another graph can be tried before anything
    has run; the rest is checked where the value appears.
    """
    graph = traced.graph
    start = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    copies: dict[fx.Node, fx.Node] = {}

    def hoist(node: fx.Node) -> fx.Node:
        if node.op in ("placeholder", "get_attr"):
            return node
        if node not in copies:
            mapping = {n: hoist(_size_source(node, n)) for n in node.all_input_nodes}
            with graph.inserting_before(start):
                copies[node] = graph.node_copy(node, lambda n: mapping[n])
            copies[node].meta["guard"] = True
        return copies[node]

    for node, value, source in traced.guards:
        early = _depends_on_sizes_only(node)
        target = hoist(node) if early else node
        where = f"{source[0]}:{source[1]}" if source else "unknown source"
        context = graph.inserting_before(start) if early else graph.inserting_after(node)
        with context:
            check = graph.call_function(check_value, (target, value, where, early))
        check.meta["guard"] = early


def _size_source(reader: fx.Node, node: fx.Node) -> fx.Node:
    """What to read a size from: behind residual adds, the input that has the same one."""
    if reader.target is not getattr or reader.args[1] != "shape":
        return node
    return _same_size(node)


def _same_size(node: fx.Node) -> fx.Node:
    value = node.meta.get("value")
    if node.op != "call_function" or not isinstance(value, Tensor):
        return node
    if getattr(node.target, "__name__", "") not in ADDS:
        return node
    for term in node.all_input_nodes:
        other = term.meta.get("value")
        if isinstance(other, Tensor) and other.shape == value.shape:
            source = _same_size(term)
            if source.op == "placeholder":
                return source
    return node


def _depends_on_sizes_only(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op != "call_function" or isinstance(node.meta.get("value"), Tensor):
        return False
    return all(_depends_on_sizes_only(_size_source(node, n)) for n in node.all_input_nodes)


# --- what surrounds a trace ---------------------------------------------------------------------


@contextlib.contextmanager
def _side_effects_undone(block: nn.Module) -> Iterator[None]:
    """Restores random state, buffers and attributes that running submodules may change."""
    modules = list(block.modules())
    attributes = [dict(m.__dict__) for m in modules]
    inner = [{k: dict(v) for k, v in m.__dict__.items() if type(v) is dict} for m in modules]
    buffers = [(b, b.detach().clone()) for b in block.buffers()]
    devices = {b.device for b in [*block.parameters(), *block.buffers()] if b.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    if buffer.device.type != "meta":
                        buffer.copy_(before)
            for module, before_dict, before_inner in zip(modules, attributes, inner, strict=True):
                module.__dict__.clear()
                module.__dict__.update(before_dict)
                for key, value in before_inner.items():
                    module.__dict__[key].clear()
                    module.__dict__[key].update(value)


def _protected_copy(value: Any, memo: dict[int, Any], label: str) -> Any:
    if isinstance(value, int | float | complex | nn.Module):
        return value
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = value.detach().clone()
        return memo[id(value)]
    try:
        with torch.no_grad(), _tensors_copied_detached():
            return copy.deepcopy(value, memo)
    except Exception as error:
        raise TraceError(
            f"cannot copy the {type(value).__name__} that {label} gets as an argument "
            f"({type(error).__name__}: {error}); tracing must not touch the original, so give it "
            "a __deepcopy__"
        ) from error


@contextlib.contextmanager
def _tensors_copied_detached() -> Iterator[None]:
    """Lets deepcopy take results of autograd, such as the keys and values in a cache."""
    original = torch.Tensor.__deepcopy__

    def copied(self: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone()
        return memo[id(self)]

    torch.Tensor.__deepcopy__ = copied  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.__deepcopy__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _patched_isinstance() -> Iterator[None]:
    """Lets `isinstance(proxy, torch.Tensor)` and the like see the proxied value's type."""
    original = builtins.isinstance

    def isinstance_of_value(value: Any, kinds: Any) -> bool:
        if type(value) is ValueProxy:
            if value._mhc_value is None:
                value._mhc_tracer.inspected = True
            return original(value, kinds) or original(value._mhc_value, kinds)
        return original(value, kinds)

    builtins.isinstance = isinstance_of_value  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance = original


@contextlib.contextmanager
def _patched_factories(tracer: _Tracer) -> Iterator[None]:
    """Lets `torch.ones(t, t)` take proxies, which torch's parser does for a tuple of sizes only."""
    names = ("ones", "zeros", "empty", "rand", "randn")
    originals = {name: getattr(torch, name) for name in names}

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            if tracer.paused or not _proxies((args, kwargs)):
                return original(*args, **kwargs)
            return tracer.create("call_function", original, args, kwargs)

        return make

    for name, original in originals.items():
        setattr(torch, name, factory(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


@contextlib.contextmanager
def _patched_autograd_apply(tracer: _Tracer) -> Iterator[None]:
    """Keeps a custom autograd.Function one node; tracing into it would drop its backward."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.paused:
            return original.__get__(None, cls)(*args, **kwargs)
        return tracer.create("call_function", _applied(original.__get__(None, cls)), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


@functools.cache
def _applied(bound: Any) -> Callable[..., Any]:
    """An autograd.Function's apply as a plain function, which fx can write into code."""

    def apply(*args: Any) -> Any:
        return bound(*args)

    apply.__name__ = f"{bound.__self__.__name__}_apply"
    apply.__self__ = bound.__self__  # type: ignore[attr-defined]
    return apply


def _proxies(value: Any) -> list[ValueProxy]:
    if type(value) is ValueProxy:
        return [value]
    if type(value) in (tuple, list) or (
        builtins.isinstance(value, tuple) and hasattr(value, "_fields")
    ):
        return [p for v in value for p in _proxies(v)]
    if builtins.isinstance(value, dict):
        return [p for v in value.values() for p in _proxies(v)]
    if type(value) is slice:
        return _proxies((value.start, value.stop, value.step))
    return []


def _unwrap(value: Any) -> Any:
    if type(value) is ValueProxy:
        return value._mhc_value
    if builtins.isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_unwrap(v) for v in value))
    if type(value) in (tuple, list):
        return type(value)(_unwrap(v) for v in value)
    if type(value) is dict:
        return {k: _unwrap(v) for k, v in value.items()}
    if type(value) is slice:
        return slice(*(_unwrap(v) for v in (value.start, value.stop, value.step)))
    return value


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
