"""The block size that minimises Eq. 20 over the real numbers, derived with sympy."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import sympy

from mhc_compile.scheduler.stages import Problem, Stage

_L, _P, _n, _m, _T, _r = sympy.symbols("L P n m T r", positive=True)


def _derive() -> sympy.Expr:
    """The square of the minimiser of m n L / (P r) + T r: a zero of the derivative."""
    cost = _m * _n * _L / (_P * _r) + _T * _r
    slope = sympy.expand(sympy.diff(cost, _r) * _r**2)  # linear in r^2
    return -slope.coeff(_r, 0) / slope.coeff(_r, 2)


_SQUARE = _derive()


def continuous_expression(problem: Problem) -> sympy.Expr:
    """r* in the symbols L, n; P and m where there is a pipeline; T where `transient` is given.

    T is the mean of the stage's `transient`, n + 2 where it is not given (Eq. 20); L/P is the
    length of a stage. The symbols carry no assumptions: `subs({"L": 12, "n": 4})` works.
    """
    values: dict[sympy.Symbol, sympy.Expr | int] = {}
    if not problem.given_transient:
        values[_T] = _n + 2
    if len(problem.stages) == 1:
        values[_P] = 1
    if all(stage.in_flight == 1 for stage in problem.stages):
        values[_m] = 1
    square = _SQUARE.subs(values)
    return sympy.sqrt(square.subs({s: sympy.Symbol(s.name) for s in square.free_symbols}))


def continuous_size(expression: sympy.Expr, problem: Problem, stage: Stage) -> float:
    """The value of the expression for one stage; in a pipeline clipped to 1 to L/P."""
    layers, stages = problem.layers, len(problem.stages)
    mean = Fraction(sum(stage.transient), len(stage.transient)) * problem.streams / stage.boundary
    values: Mapping[str, int | sympy.Rational] = {
        "L": layers, "P": stages, "n": problem.streams, "m": stage.in_flight,
        "T": sympy.Rational(mean.numerator, mean.denominator),
    }  # fmt: skip
    size = float(expression.subs(values))
    if stages == 1 and stage.in_flight == 1:
        return size
    return min(max(size, 1.0), layers / stages)
