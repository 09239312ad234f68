"""Arguments of a traced call as what a torch.fx node can hold."""

from __future__ import annotations

import builtins
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_compile._torch_compat import user_source
from mhc_compile.errors import TraceError
from mhc_compile.passes.containers import CONSTANTS, children, is_named_tuple, is_record
from mhc_compile.passes.trace_errors import Restart, here
from mhc_compile.passes.value_proxy import SizeProxy, ValueProxy, proxies_in


def node_argument(tracer: Any, a: Any) -> Any:
    """Turns an argument into what a node can hold."""
    if type(a) is ValueProxy:
        return a._mhc_node
    if id(a) in tracer.built:
        return tracer.built[id(a)]
    if builtins.isinstance(a, Tensor | nn.Module):
        return _attribute_node(tracer, a)
    if is_named_tuple(a):
        return type(a)(*(node_argument(tracer, v) for v in a))
    if type(a) in (tuple, list, torch.Size, SizeProxy):
        items = [node_argument(tracer, v) for v in a]
        return items if type(a) is list else tuple(items)
    if type(a) is dict:
        return {k: node_argument(tracer, v) for k, v in a.items()}
    if type(a) is slice:
        return slice(*(node_argument(tracer, v) for v in (a.start, a.stop, a.step)))
    if builtins.isinstance(a, dict) and proxies_in(a):  # e.g. a model output
        return _construct(tracer, type(a), {k: node_argument(tracer, v) for k, v in a.items()})
    if is_record(a) or hasattr(type(a), "__dataclass_fields__") and proxies_in(vars(a)):
        fields = children(a) or list(vars(a).items())
        return _construct(tracer, type(a), {str(k): node_argument(tracer, v) for k, v in fields})
    if builtins.isinstance(a, type | types.FunctionType | types.BuiltinFunctionType):
        return tracer.graph.call_function(_constant(a))
    if builtins.isinstance(a, CONSTANTS) or type(a) in (int, float, complex, range):
        return a
    if type(a).__module__ == "numpy":
        return a.item() if a.ndim == 0 else tracer.graph.call_function(_array(a))
    if id(a) in tracer.objects:
        return tracer.attribute(tracer.objects[id(a)], a)._mhc_node
    return _unknown(tracer, a)


def _construct(tracer: Any, kind: type, fields: dict[str, Any]) -> fx.Node:
    node = tracer.graph.call_function(kind, (), fields)
    node.meta["source"] = user_source()
    return node


def _unknown(tracer: Any, a: Any) -> Any:
    kind = type(a)
    if kind.__flags__ & 1 << 9 and not callable(a) and "__dict__" in dir(a):  # a heap type
        raise Restart("classes", kind)
    raise TraceError(
        f"{tracer.label} passes a {kind.__name__} at {here()} that a torch.fx graph "
        "cannot hold; pass tensors, numbers, strings, and tuples, lists or dicts of them"
    )


def _attribute_node(tracer: Any, a: Tensor | nn.Module) -> fx.Node:
    if builtins.isinstance(a, nn.Module) and id(a) in tracer.modules:
        return tracer.module_node(a)
    name = tracer.tensors.get(id(a))
    if not name:
        raise TraceError(
            f"{tracer.label} uses a {type(a).__name__} at {here()} that is neither an argument "
            "of its forward nor one of its parameters, buffers or submodules; register it"
        )
    return tracer.attribute(name, a)._mhc_node


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
