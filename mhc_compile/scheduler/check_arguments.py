"""What the scheduler's functions are given, checked one argument at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any

import numpy as np

from mhc_compile.errors import ConfigError


def as_integer(name: str, value: Any, *, most: int | None = None) -> int:
    """Returns `value`, an integer of at least 1, as an int.

    Raises:
        ConfigError: it is no integer, below 1 or above `most`.
    """
    allowed = "at least 1" if most is None else f"1 to {most}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{name} must be an integer, {allowed}, got {value!r}")
    number = int(value)
    if number < 1 or (most is not None and number > most):
        raise ConfigError(f"{name} must be {allowed}, got {number}")
    return number


def as_size(name: str, value: Any, *, zero: bool = False, or_else: str = "") -> int | Fraction:
    """Returns a size without rounding: an int, or a fraction for what is not integral.

    Args:
        name: of the argument, for the message.
        value: the size.
        zero: whether it may be 0.
        or_else: what else would be allowed, for the message.

    Raises:
        ConfigError: it is no finite number, negative, or zero where `zero` is false.
    """
    size = _exact(value)
    if size is None or size < 0 or (size == 0 and not zero):
        allowed = "at least 0" if zero else "above 0"
        raise ConfigError(f"{name} must be a finite number {allowed}{or_else}, got {value!r}")
    return size


def _exact(value: Any) -> int | Fraction | None:
    """The same number, or None for what is none; Python's own types first, which is faster."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return Fraction(value) if math.isfinite(value) else None
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Rational):
        return Fraction(int(value.numerator), int(value.denominator))
    return _exact(float(value)) if isinstance(value, Real) else None


def as_sequence(value: Any) -> list[Any] | None:
    """Returns the items of a list, tuple or array; None for anything else."""
    if isinstance(value, np.ndarray) and value.ndim:
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return list(value)
    return None


def check_length(name: str, values: Sequence[Any], length: int, of: str) -> None:
    """Checks that there is one value for each of what `of` names.

    Raises:
        ConfigError: there are more or fewer.
    """
    if len(values) != length:
        raise ConfigError(
            f"{name} must be one number or a sequence of {length}, one per {of}; got "
            f"{len(values)} numbers"
        )


def as_sizes(name: str, value: Any, length: int, *, zero: bool = False) -> list[int | Fraction]:
    """Returns one size per sublayer, of a number or a sequence; see `as_size`.

    Raises:
        ConfigError: the number of values is wrong or one of them is no size.
    """
    values = as_sequence(value)
    if values is None:
        other = f" or a sequence of {length}, one per sublayer"
        return [as_size(name, value, zero=zero, or_else=other)] * length
    check_length(name, values, length, "sublayer")
    return [as_size(f"{name}[{i}]", each, zero=zero) for i, each in enumerate(values)]
