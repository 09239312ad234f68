"""What Python asks of proxies: truth, numbers, texts and keys, which become guards."""

from __future__ import annotations

import builtins
import contextlib
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mhc_compile.errors import TraceError
from mhc_compile.passes.trace_errors import here
from mhc_compile.passes.trace_guards import GuardList, is_overflow_check
from mhc_compile.passes.value_proxy import ValueProxy

_NUMBERS = int | float | complex


class ProxyQueries:
    """The part of a tracer that answers them."""

    label: str
    paused: int
    guards: GuardList
    create: Callable[..., Any]
    pause: Callable[[], contextlib.AbstractContextManager[None]]

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
