"""Builds the graph of one block while its Python runs on proxies."""

from __future__ import annotations

import builtins
import contextlib
import functools
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from mhc_compile._torch_compat import Source, compiled_module, user_source
from mhc_compile.errors import TraceError
from mhc_compile.passes.call_paths import LeafPath
from mhc_compile.passes.containers import (
    CONSTANTS,
    children,
    form_of,
    is_named_tuple,
    is_record,
)
from mhc_compile.passes.trace_guards import GuardList, is_overflow_check
from mhc_compile.passes.value_proxy import (
    Method,
    SizeProxy,
    ValueProxy,
    proxies_in,
    unwrapped,
)

SELF = "forward.__self__"
"""The block itself as an attribute of the block, for nodes that need the module."""

_STATIC_ATTRIBUTES = frozenset(
    {"dtype", "device", "ndim", "layout", "is_cuda", "is_nested", "is_sparse"}
)
_AUTOGRAD_ATTRIBUTES = frozenset({"requires_grad", "grad_fn", "is_leaf", "grad"})
_SIZE_METHODS = frozenset({"size", "dim", "numel", "nelement", "stride", "element_size"})


class Restart(Exception):  # noqa: N818  # a signal: the trace needs another preparation
    """The block has to be traced again with something kept opaque or symbolic.

    `kind` names a set of `trace_block.Preparation`, `item` what to add to it.
    """

    def __init__(self, kind: str, item: Any) -> None:
        super().__init__(kind)
        self.kind, self.item = kind, item


class _RecordFunctions(TorchFunctionMode):
    """Sends torch functions to the tracer, also those without a proxy among their arguments."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self,
        func: Any,
        types_: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        tracer, kwargs = self.tracer, kwargs or {}
        if tracer.paused:
            return func(*args, **kwargs)
        proxies = proxies_in((args, kwargs))
        tracer.guards.drop_index(proxies)
        if proxies:
            return tracer.create("call_function", _public(func), args, kwargs)
        known = _holds_tensor((args, kwargs)) and not _is_accessor(func)
        if known and all(id(t) in tracer.tensors for t in _tensors_in((args, kwargs))):
            return tracer.create("call_function", _public(func), args, kwargs)
        if known and is_in_place(func, kwargs):
            tracer.create_arg(args)  # a tensor from elsewhere: raises before anything is written
        with tracer.pause():
            value = func(*args, **kwargs)
        if not builtins.isinstance(value, Tensor) or _is_accessor(func):
            return value
        return tracer.create("call_function", _public(func), args, kwargs, value)


_UNKNOWN = object()
_NUMBERS = int | float | complex


class Tracer:
    """Builds the graph of one block and computes each node's value as it goes."""

    def __init__(
        self,
        block: nn.Module,
        opened: frozenset[str],
        label: str,
        sites: frozenset[Source],
        call_opened: Callable[..., Any],
    ) -> None:
        self.block, self.label, self.sites = block, label, sites
        self.graph = fx.Graph()
        self.inputs: dict[LeafPath, fx.Node] = {}
        self.guards = GuardList()
        self.paused = 0
        self.grad_enabled = torch.is_grad_enabled()
        self.inspected = False
        self.modules = {id(m): name for name, m in block.named_modules()}
        self.opened = {id(block.get_submodule(name)) for name in opened} | {id(block)}
        named = [*block.named_parameters(remove_duplicate=False),
                 *block.named_buffers(remove_duplicate=False)]  # fmt: skip
        self.tensors = {id(t): name for name, t in reversed(named)}
        self.objects: dict[int, str] = {}
        self.built: dict[int, fx.Node] = {}
        self.attributes: dict[str, ValueProxy] = {}
        self.proxies: dict[int, list[ValueProxy]] = {}
        self.overwritten: dict[int, tuple[Tensor, Tensor]] = {}
        self.failed: Exception | None = None
        self.modes: dict[int, list[fx.Node]] = {}
        self.notes: list[str] = []
        self.call_opened = call_opened
        self.opened_seen: dict[str, tuple[type, bool, str]] = {}
        self.on_opened: Callable[[], Any] | None = None
        self.keep_alive: list[Any] = []

    @contextlib.contextmanager
    def record_functions(self) -> Iterator[None]:
        """Sends torch functions to this tracer."""
        with _RecordFunctions(self):
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
            if self.on_opened is not None and id(module) in self.opened:
                self.on_opened()
            return self._run(module, args, kwargs)
        inner = compiled_module(module) or module
        if id(inner) in self.opened:
            return self.call_opened(self, inner, args, kwargs)
        name = self.modules.get(id(module))
        if name is None and next(module.parameters(), next(module.buffers(), None)) is None:
            return module.forward(*args, **kwargs)  # made in the forward, such as nn.Softmax(-1)(x)
        if name is None:
            raise TraceError(
                f"{self.label} calls a {type(module).__name__} at {here()} that is not one of its "
                "submodules; register it on the block"
            )
        return self.create("call_module", name, args, kwargs)

    def create(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        value: Any = _UNKNOWN,
        *,
        effect: bool = False,
    ) -> Any:
        """Adds a node, computes its value unless it is known, and returns the wrapped value.

        `effect` keeps the node even where nothing reads its result.
        """
        args, kwargs = tuple(args), dict(kwargs)
        if self.paused:
            return self._evaluate(kind, target, unwrapped(args), unwrapped(kwargs))
        node = self.graph.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        node.meta["source"] = user_source()
        if effect:
            node.meta["effect"] = True
        in_place = is_in_place(target, kwargs)
        if in_place:
            self._save_overwritten(args, kwargs)
        given = value is not _UNKNOWN
        if not given:
            try:
                with self.pause():
                    value = self._evaluate(kind, target, unwrapped(args), unwrapped(kwargs))
            except Exception as error:
                self.failed = error
                raise
        if in_place:
            node.meta["in_place"] = True
            self._update_aliases(node, args, kwargs)
        return self.wrap(node, value, given or in_place)

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_function":
            return target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return self._run(self.block.get_submodule(target), args, kwargs)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a submodule for its result; hooks saw the real call, not this rehearsal."""
        try:
            return module.forward(*args, **kwargs)
        except Exception:
            if not module._forward_pre_hooks:
                raise
            # Its pre-hooks fetch what its forward needs.
            return module._call_impl(*args, **kwargs)

    def _save_overwritten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Parameters and attributes that a write in place would change are put back later."""
        for written in _written(args, kwargs):
            tensor = written._mhc_value
            if written._mhc_node.op == "get_attr" and builtins.isinstance(tensor, Tensor):
                with self.pause():
                    self.overwritten.setdefault(id(tensor), (tensor, tensor.detach().clone()))

    def restore_overwritten(self) -> None:
        """Undoes in-place writes of the rehearsal."""
        with self.pause(), torch.no_grad():
            for tensor, before in self.overwritten.values():
                if tensor.device.type != "meta":
                    tensor.copy_(before)

    def _update_aliases(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After an in-place write every name of that tensor stands for the new value."""
        written = _written(args, kwargs)
        if kwargs.get("out") is not None and len(written) != 1:
            raise TraceError(
                f"{self.label} writes to several tensors at once with out= at {here()}, which a "
                "graph does not follow; assign the results instead"
            )
        for proxy in written:
            node.meta["value"] = proxy._mhc_value
            for alias in self.proxies.get(id(proxy._mhc_value), []):
                alias._mhc_node = node

    def proxy_for(self, node: fx.Node, value: Any) -> ValueProxy:
        """A proxy of a node whose value is known."""
        node.meta["value"] = value
        proxy = ValueProxy(node, self, value)
        self.proxies.setdefault(id(value), []).append(proxy)
        return proxy

    def wrap(self, node: fx.Node, value: Any, done: bool = False) -> Any:
        """Wraps a result: containers stay containers, constants stay constants.

        Their form becomes a guard, since the traced code sees it. A constant has none if the node
        was called for something else than its result (`done`).
        """
        parts = _is_container(value)
        if parts or builtins.isinstance(value, CONSTANTS) and type(value) is not bool and not done:
            self._guard_form(node, value)
        return self._wrap(node, value)

    def _guard_form(self, node: fx.Node, value: Any) -> None:
        owner = node.args[0] if type(value) is torch.Size and node.args else None
        if builtins.isinstance(owner, fx.Node) and owner.op == "placeholder":
            return  # the number of dimensions is part of the graph's key
        look: Callable[[Any], Any] = len if type(value) is torch.Size else form_of
        form = self.graph.call_function(look, (node,))
        form.meta["per_stream"] = True  # n-stream tensors have the same form
        self.guards.add(form, look(value))

    def _wrap(self, node: fx.Node, value: Any) -> Any:
        if type(value) in (tuple, list, torch.Size):
            items = [self._item(node, i, v) for i, v in enumerate(value)]
            if type(value) is torch.Size:
                return SizeProxy(items)
            return items if type(value) is list else tuple(items)
        if is_named_tuple(value):
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
        return self._wrap(item, value)

    # --- attributes -----------------------------------------------------------------------

    def read_attribute(self, proxy: ValueProxy, name: str) -> Any:
        """Records `proxy.name`; dtype, device and the like are returned as constants."""
        node, owner = proxy._mhc_node, proxy._mhc_value
        is_tensor = builtins.isinstance(owner, Tensor)
        fixed = is_tensor and node.op == "get_attr"
        if is_tensor and name in _AUTOGRAD_ATTRIBUTES and not self.paused and not fixed:
            raise TraceError(
                f"{self.label} reads .{name} of a tensor at {here()}; a graph cannot depend on "
                "autograd's state"
            )
        with self.pause():
            value = getattr(owner, name)
        if self.paused:
            return value
        if fixed and builtins.isinstance(owner, nn.Parameter):
            if name in _SIZE_METHODS or name in ("shape", "is_leaf", "grad"):
                return value
        if callable(value) and not builtins.isinstance(value, Tensor | nn.Module):
            return Method(proxy, name)
        read = self.graph.call_function(getattr, (node, name))
        read.meta["source"] = user_source()
        if is_tensor and (name in _STATIC_ATTRIBUTES or name == "requires_grad"):
            read.meta["value"] = value
            if node.op != "placeholder":  # a placeholder's are part of the graph's key
                self.guards.add(read, value)
            return value
        return self.wrap(read, value)

    def attribute(self, path: str, value: Any) -> ValueProxy:
        """A proxy of `self.<path>`, read where the graph starts."""
        if path not in self.attributes:
            with self.graph.inserting_before(self._first_node()):
                node = self.graph.get_attr(path)
            self.attributes[path] = self.proxy_for(node, value)
        return self.attributes[path]

    def module_node(self, module: nn.Module) -> fx.Node:
        """The node of a module of the block, or of the block itself."""
        return self.attribute(self.modules[id(module)] or SELF, module)._mhc_node

    def late_attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        """Reads an attribute where the code does, because the run has changed it."""
        node = self.graph.call_function(getattr, (self.module_node(module), name))
        node.meta.update(source=user_source(), late=True)
        return self.wrap(node, value)

    # --- arguments of nodes ---------------------------------------------------------------

    def create_arg(self, a: Any) -> Any:
        """Turns an argument into what a node can hold."""
        if type(a) is ValueProxy:
            return a._mhc_node
        if id(a) in self.built:
            return self.built[id(a)]
        if builtins.isinstance(a, Tensor | nn.Module):
            return self._attribute_node(a)
        if is_named_tuple(a):
            return type(a)(*(self.create_arg(v) for v in a))
        if type(a) in (tuple, list, torch.Size, SizeProxy):
            items = [self.create_arg(v) for v in a]
            return items if type(a) is list else tuple(items)
        if type(a) is dict:
            return {k: self.create_arg(v) for k, v in a.items()}
        if type(a) is slice:
            return slice(*(self.create_arg(v) for v in (a.start, a.stop, a.step)))
        if builtins.isinstance(a, dict) and proxies_in(a):  # e.g. a model output
            return self._construct(type(a), {k: self.create_arg(v) for k, v in a.items()})
        if is_record(a) or hasattr(type(a), "__dataclass_fields__") and proxies_in(vars(a)):
            fields = children(a) or list(vars(a).items())
            return self._construct(type(a), {str(k): self.create_arg(v) for k, v in fields})
        if builtins.isinstance(a, type | types.FunctionType | types.BuiltinFunctionType):
            return self.graph.call_function(_constant(a))
        if builtins.isinstance(a, CONSTANTS) or type(a) in (int, float, complex, range):
            return a
        if type(a).__module__ == "numpy":
            return a.item() if a.ndim == 0 else self.graph.call_function(_array(a))
        if id(a) in self.objects:
            return self.attribute(self.objects[id(a)], a)._mhc_node
        return self._unknown(a)

    def _construct(self, kind: type, fields: dict[str, Any]) -> fx.Node:
        node = self.graph.call_function(kind, (), fields)
        node.meta["source"] = user_source()
        return node

    def _unknown(self, a: Any) -> Any:
        kind = type(a)
        if kind.__flags__ & 1 << 9 and not callable(a) and "__dict__" in dir(a):  # a heap type
            raise Restart("classes", kind)
        raise TraceError(
            f"{self.label} passes a {kind.__name__} at {here()} that a torch.fx graph "
            "cannot hold; pass tensors, numbers, strings, and tuples, lists or dicts of them"
        )

    def _attribute_node(self, a: Tensor | nn.Module) -> fx.Node:
        if builtins.isinstance(a, nn.Module) and id(a) in self.modules:
            return self.module_node(a)
        name = self.tensors.get(id(a))
        if not name:
            raise TraceError(
                f"{self.label} uses a {type(a).__name__} at {here()} that is neither an argument "
                "of its forward nor one of its parameters, buffers or submodules; register it"
            )
        return self.attribute(name, a)._mhc_node

    def _first_node(self) -> fx.Node | None:
        return next((n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr")), None)

    # --- what Python asks of proxies ------------------------------------------------------

    def truth_of(self, proxy: ValueProxy) -> bool:
        """`bool(proxy)`: a guard, unless it depends on data."""
        value = proxy._mhc_value
        if builtins.isinstance(value, Tensor):
            if not is_overflow_check(proxy._mhc_node) or value.device.type == "meta":
                self.fail_on_data("bool()")
            with self.pause():
                value = bool(value)
            self.guards.add(proxy._mhc_node, value)
            return value
        if type(value) is not bool:
            return bool(self.create("call_function", operator.truth, (proxy,), {}))
        self.guards.add(proxy._mhc_node, value)
        return value

    def specialised(self, proxy: ValueProxy, what: str) -> Any:
        """The value of a number that Python needs to know."""
        if builtins.isinstance(proxy._mhc_value, Tensor):
            self.fail_on_data(what)
        self.guards.add(proxy._mhc_node, proxy._mhc_value)
        return proxy._mhc_value

    def written_out(self, proxy: ValueProxy) -> Any:
        """What `str(proxy)` and f-strings show: a number becomes a guard."""
        value = proxy._mhc_value
        if self.paused or not builtins.isinstance(value, _NUMBERS | Tensor):
            return value
        return self.specialised(proxy, "the text")

    def key_of(self, proxy: ValueProxy) -> Any:
        """What a dict or a set looks up: a number becomes a guard."""
        known = self.paused or not builtins.isinstance(proxy._mhc_value, _NUMBERS)
        return proxy._mhc_value if known else self.specialised(proxy, "a key")

    def index_of(self, proxy: ValueProxy) -> int:
        """`__index__`: a guard, unless it only was torch looking at an argument's type."""
        if builtins.isinstance(proxy._mhc_value, Tensor):
            self.fail_on_data("an index or a size")
        if not self.paused:
            self.guards.add_index(proxy)
        return operator.index(proxy._mhc_value)

    def fail_on_data(self, what: str) -> None:
        """Control flow that depends on tensor values cannot be a graph."""
        raise TraceError(
            f"{self.label} takes {what} of a tensor at {here()}, so its control flow depends on "
            "data; move that code into a submodule that does not hold the residual add, or leave "
            "the block out with filter_fn"
        )


@functools.cache
def _constant(value: Any) -> Callable[[], Any]:
    """A class or function as the result of a call, since fx cannot write it into code."""

    def constant() -> Any:
        return value

    return constant


def _array(value: Any) -> Callable[[], Any]:
    """A numpy array as the result of a call; what it depends on is guarded."""

    def array() -> Any:
        return value

    return array


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


def is_in_place(target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function or method changes its first argument."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    return (
        name in ("setitem", "__setitem__", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow",
                 "imatmul", "iand", "ior")
        or kwargs.get("inplace") is True
        or kwargs.get("out") is not None
    )  # fmt: skip


def _written(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[ValueProxy]:
    """The proxies of what a function changes in place: `out`, else its first argument."""
    if kwargs.get("out") is not None:
        return proxies_in(kwargs["out"])
    return [a for a in args if type(a) is ValueProxy][:1]


def _is_container(value: Any) -> bool:
    return type(value) in (tuple, list, torch.Size, dict) or is_named_tuple(value)


def _tensors_in(value: Any) -> list[Tensor]:
    if builtins.isinstance(value, Tensor):
        return [value]
    return [t for _, v in children(value) or () for t in _tensors_in(v)]


def _holds_tensor(value: Any) -> bool:
    return bool(_tensors_in(value))


def here() -> str:
    """The line of user code that runs, as messages give it."""
    source = user_source(3)
    return f"{source[0]}:{source[1]}" if source else "an unknown line"


__all__ = ["Restart", "Tracer", "here", "is_in_place"]
