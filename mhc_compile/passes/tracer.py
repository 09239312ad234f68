"""Builds the graph of one block while its Python runs on proxies."""

from __future__ import annotations

import builtins
import contextlib
import operator
import sys
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
    form_of,
    is_named_tuple,
)
from mhc_compile.passes.node_arguments import node_argument
from mhc_compile.passes.proxy_queries import ProxyQueries
from mhc_compile.passes.torch_functions import (
    holds_tensor,
    is_accessor,
    is_in_place,
    public_name,
    tensors_in,
    written_in,
)
from mhc_compile.passes.trace_errors import here
from mhc_compile.passes.trace_guards import GuardList
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
            return tracer.create("call_function", public_name(func), args, kwargs)
        known = holds_tensor((args, kwargs)) and not is_accessor(func)
        if known and all(id(t) in tracer.tensors for t in tensors_in((args, kwargs))):
            return tracer.create("call_function", public_name(func), args, kwargs)
        if known and is_in_place(func, kwargs):
            tracer.create_arg(args)  # a tensor from elsewhere: raises before anything is written
        with tracer.pause():
            value = func(*args, **kwargs)
        if not builtins.isinstance(value, Tensor) or is_accessor(func):
            return value
        return tracer.create("call_function", public_name(func), args, kwargs, value)


_UNKNOWN = object()


class Tracer(ProxyQueries):
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
        self.watcher: Callable[..., Any] | None = None
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
            with self.unwatched():
                yield
        finally:
            self.paused -= 1

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Runs what is no traced code without the profile function, which costs time a call."""
        watcher, self.watcher = self.watcher, None
        if watcher is not None:
            sys.setprofile(None)
        try:
            yield
        finally:
            if watcher is not None:
                self.watcher = watcher
                sys.setprofile(watcher)

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
        with self.unwatched():
            return self._create(kind, target, args, kwargs, value, effect)

    def _create(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any,
        effect: bool,
    ) -> Any:  # fmt: skip
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
        for written in written_in(args, kwargs):
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
        written = written_in(args, kwargs)
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

    def _first_node(self) -> fx.Node | None:
        return next((n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr")), None)

    def module_node(self, module: nn.Module) -> fx.Node:
        """The node of a module of the block, or of the block itself."""
        return self.attribute(self.modules[id(module)] or SELF, module)._mhc_node

    def late_attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        """Reads an attribute where the code does, because the run has changed it."""
        node = self.graph.call_function(getattr, (self.module_node(module), name))
        node.meta.update(source=user_source(), late=True)
        return self.wrap(node, value)

    def create_arg(self, a: Any) -> Any:
        """Turns an argument into what a node can hold."""
        return node_argument(self, a)


def _is_container(value: Any) -> bool:
    return type(value) in (tuple, list, torch.Size, dict) or is_named_tuple(value)
