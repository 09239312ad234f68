"""Sends calls of a Python function elsewhere for a while, however the caller imported it."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from mhc_compile._torch_compat import Source

STAND_IN = "_mhc_stand_in"
"""Marks the copy of a function that runs while its code is swapped."""

_MARK = 987654321


@contextlib.contextmanager
def swapped_code(
    function: types.FunctionType, handler: Callable[..., Any]
) -> Iterator[Callable[..., Any]]:
    """Makes every call of `function` a call `handler(*args, **kwargs)`.

    Yields:
        The function as it was, for the handler to call.
    """
    code = function.__code__
    original = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    original.__dict__[STAND_IN] = True
    function.__code__ = _forwarding(handler, code)
    try:
        yield original
    finally:
        function.__code__ = code


def _forwarding(handler: Callable[..., Any], like: types.CodeType) -> types.CodeType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        text = f"def call(*args, **kwargs): return {_MARK}(*args, **kwargs)"
        module = compile(text, __file__, "exec")
    code = next(c for c in module.co_consts if isinstance(c, types.CodeType))
    constants = tuple(handler if c == _MARK else c for c in code.co_consts)
    return code.replace(co_consts=constants, co_freevars=like.co_freevars, co_name=like.co_name)


def code_of(function: Any) -> types.CodeType | None:
    """The code object behind a function, bound method or partial of one."""
    while True:
        inner = getattr(function, "__func__", None) or getattr(function, "func", None)
        if inner is None:
            code = getattr(function, "__code__", None)
            return code if isinstance(code, types.CodeType) else None
        function = inner


def holds_line(code: types.CodeType | None, sources: frozenset[Source]) -> bool:
    """Whether a source line belongs to a function or to one defined in it."""
    if code is None:
        return False
    lines = {line for _, _, line in code.co_lines() if line is not None}
    if any(file == code.co_filename and line in lines for file, line in sources):
        return True
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return any(holds_line(c, sources) for c in inner)
