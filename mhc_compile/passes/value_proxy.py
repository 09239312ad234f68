"""Proxies that know their value, on which a block's Python runs while it is traced."""

from __future__ import annotations

import builtins
import copy
import functools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


class ValueProxy:
    """Stands for a node's result in the traced code and knows its value in the example.

    Its own fields have names that no value's attribute has, so that `proxy.x` is always the
    value's `x`.
    """

    def __init__(self, node: fx.Node, tracer: Any, value: Any) -> None:
        self._mhc_node = node
        self._mhc_tracer = tracer
        self._mhc_value = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_mhc_"):
            object.__setattr__(self, name, value)
        else:
            self._mhc_tracer.create("call_function", setattr, (self, name, value), {}, effect=True)

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
        tracer = proxies_in((args, kwargs or {}))[0]._mhc_tracer
        return tracer.create("call_function", func, args, kwargs or {})

    def __bool__(self) -> bool:
        return bool(self._mhc_tracer.truth_of(self))

    def __index__(self) -> int:
        return self._mhc_tracer.index_of(self)

    def __int__(self) -> int:
        return int(self._mhc_tracer.specialised(self, "int()"))

    def __float__(self) -> float:
        return float(self._mhc_tracer.specialised(self, "float()"))

    def __complex__(self) -> complex:
        return complex(self._mhc_tracer.specialised(self, "complex()"))

    def __round__(self, digits: int | None = None) -> Any:
        return self._mhc_tracer.create("call_function", round, (self, digits), {})

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        import numpy

        return numpy.asarray(self._mhc_tracer.specialised(self, "a numpy array"), dtype)

    def __len__(self) -> int:
        length = self._mhc_tracer.create("call_function", len, (self,), {})
        return int(self._mhc_tracer.specialised(length, "len()"))

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, i) for i in range(len(self))])  # type: ignore[call-overload]

    def __contains__(self, item: Any) -> bool:
        return bool(self._mhc_tracer.create("call_function", operator.contains, (self, item), {}))

    def __delitem__(self, key: Any) -> None:
        self._mhc_tracer.create("call_function", operator.delitem, (self, key), {}, effect=True)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._mhc_tracer.create("call_function", operator.setitem, (self, key, value), {})

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other  # type: ignore[operator]

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self

    def __ceil__(self) -> Any:
        return self._mhc_tracer.create("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self._mhc_tracer.create("call_function", math.floor, (self,), {})

    def __trunc__(self) -> Any:
        return self._mhc_tracer.create("call_function", math.trunc, (self,), {})

    def __repr__(self) -> str:
        return repr(self._mhc_tracer.written_out(self))

    def __str__(self) -> str:
        return str(self._mhc_tracer.written_out(self))

    def __format__(self, spec: str) -> str:
        return format(self._mhc_tracer.written_out(self), spec)

    def __hash__(self) -> int:
        """A number's own, so that dicts and sets find it; torch hashes tensors by identity."""
        return hash(self._mhc_tracer.key_of(self))


def _operator(
    function: Callable[..., Any], reflected: bool = False, on_number: Any = None
) -> Callable[..., Any]:
    def method(self: ValueProxy, *others: Any) -> Any:
        args = (*others, self) if reflected else (self, *others)
        number = on_number is not None and type(self._mhc_value) in (int, float, bool)
        target = on_number if number else function
        return self._mhc_tracer.create("call_function", target, args, {})

    return method


_REFLECTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "pow", "and", "or",
              "xor", "lshift", "rshift")  # fmt: skip
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imatmul", "ipow", "iand", "ior")
_OTHERS = ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "invert", "getitem")
for _name in _IN_PLACE:
    _plain = getattr(operator, f"__{_name[1:]}__")
    _method = _operator(getattr(operator, f"__{_name}__"), on_number=_plain)
    setattr(ValueProxy, f"__{_name}__", _method)
for _name in (*_REFLECTED, *_OTHERS):
    setattr(ValueProxy, f"__{_name}__", _operator(getattr(operator, f"__{_name}__")))
for _name in _REFLECTED:
    setattr(ValueProxy, f"__r{_name}__", _operator(getattr(operator, f"__{_name}__"), True))
ValueProxy.__abs__ = _operator(abs)  # type: ignore[attr-defined]


@dataclass
class Method:
    """A method of a proxied value, looked up and not yet called."""

    owner: ValueProxy
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Records the call."""
        return self.owner._mhc_tracer.create("call_method", self.name, (self.owner, *args), kwargs)


class SizeProxy(tuple):  # type: ignore[type-arg]
    """A torch.Size of proxies."""

    def numel(self) -> Any:
        """The product of the sizes."""
        return functools.reduce(operator.mul, self, 1)

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return SizeProxy(found) if type(key) is slice else found

    def __repr__(self) -> str:
        return f"torch.Size({list(self)!r})"


def proxies_in(value: Any) -> list[ValueProxy]:
    """The proxies in nested containers and slices."""
    if type(value) is ValueProxy:
        return [value]
    if builtins.isinstance(value, tuple) or type(value) is list:
        return [p for v in value for p in proxies_in(v)]
    if builtins.isinstance(value, dict):
        return [p for v in value.values() for p in proxies_in(v)]
    if type(value) is slice:
        return proxies_in((value.start, value.stop, value.step))
    if hasattr(type(value), "__dataclass_fields__") and not builtins.isinstance(value, type):
        return proxies_in(vars(value)) if hasattr(value, "__dict__") else []
    return []


def unwrapped(value: Any) -> Any:
    """Nested containers with values in the place of proxies."""
    if type(value) is ValueProxy:
        return value._mhc_value
    if builtins.isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(unwrapped(v) for v in value))
    if type(value) in (tuple, list):
        return type(value)(unwrapped(v) for v in value)
    if type(value) is SizeProxy:
        return torch.Size(unwrapped(v) for v in value)
    if type(value) is dict:
        return {k: unwrapped(v) for k, v in value.items()}
    if type(value) is slice:
        return slice(*(unwrapped(v) for v in (value.start, value.stop, value.step)))
    if proxies_in(value):  # a dataclass, or a dict with a class of its own
        if builtins.isinstance(value, dict) and not hasattr(type(value), "__dataclass_fields__"):
            return type(value)((k, unwrapped(v)) for k, v in value.items())
        changed = copy.copy(value)
        for name, part in list(vars(value).items()):
            object.__setattr__(changed, name, unwrapped(part))
        if builtins.isinstance(value, dict):
            for key, part in value.items():
                dict.__setitem__(changed, key, unwrapped(part))
        return changed
    return value
