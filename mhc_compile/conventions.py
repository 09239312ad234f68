"""Named sets of the numerical choices in which implementations of mHC differ."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from types import MappingProxyType
from typing import TypedDict

from mhc_compile.errors import ConfigError

SINKHORN_ORDERS = ("col_row", "row_col")
SINKHORN_STARTS = ("exp", "softmax")
SINKHORN_EPS_MODES = ("none", "add", "clamp")
NORM_EPS_PLACES = ("inside", "outside")


class SinkhornAxes(TypedDict):
    """The keyword arguments by which `runtime.sinkhorn.sinkhorn_knopp` takes a convention."""

    order: str
    start: str
    start_is_step: bool
    eps: float
    eps_mode: str


@dataclass(frozen=True)
class Convention:
    """One set of the numerical axes of mHC (arXiv 2512.24880, Eq. 14-19); defaults are the paper's.

    Whatever the convention, streams are laid out as `[..., n, C]`, `phi` has its rows in that order
    and its columns ordered pre, post, res, and `res` leaves this package as `res[out, in]`.

    Raises:
        ConfigError: an axis has a value outside its range, or two axes contradict each other.

    Example:
        >>> Convention("mine", sinkhorn_iters=5).sinkhorn_order
        'col_row'
    """

    name: str
    """The key in `CONVENTIONS`, or any name for a set of one's own."""
    res_transposed: bool = False
    """True if the Sinkhorn matrix `M` acts as `M.T @ x`, so that its rows are the input streams."""
    sinkhorn_order: str = "col_row"
    """What one iteration normalises: "col_row" (columns, then rows) or "row_col"."""
    sinkhorn_start: str = "exp"
    """The first matrix: "exp" of the logits, or "softmax" over the last axis.

    Working in the log domain is a way to compute "exp" without eps, not a third start.
    """
    sinkhorn_start_is_step: bool = False
    """True if a softmax start stands in for the first row step of a "row_col" order."""
    sinkhorn_eps: float = 0.0
    """The eps of `sinkhorn_eps_mode`; 0 if and only if that is "none"."""
    sinkhorn_eps_mode: str = "none"
    """How eps enters a divisor: not at all, "add" (sum + eps) or "clamp" (max(sum, eps)).

    With "add", a softmax start has eps added to its elements too.
    """
    sinkhorn_iters: int = 20
    """Iterations, each of one column step and one row step."""
    norm_eps: float = 1e-20
    """The eps of the RMSNorm divisor of Eq. 15."""
    norm_eps_place: str = "inside"
    """"inside": sqrt(mean square + eps); "outside": sqrt(mean square) + eps."""
    pre_eps: float = 0.0
    """Added to the sigmoid of the pre map."""
    post_multiplier: float = 2.0
    """Factor on the sigmoid of the post map."""
    alpha_init: float = 0.01
    """Initial value of the three scalar gates, for training from scratch."""

    def __post_init__(self) -> None:
        """Checks every axis by itself, then the pairs that could contradict each other."""
        _check_choice("sinkhorn_order", self.sinkhorn_order, SINKHORN_ORDERS)
        _check_choice("sinkhorn_start", self.sinkhorn_start, SINKHORN_STARTS)
        _check_choice("sinkhorn_eps_mode", self.sinkhorn_eps_mode, SINKHORN_EPS_MODES)
        _check_choice("norm_eps_place", self.norm_eps_place, NORM_EPS_PLACES)
        for axis in ("sinkhorn_eps", "norm_eps", "pre_eps"):
            _check_number(axis, getattr(self, axis), minimum=0.0)
        _check_number("post_multiplier", self.post_multiplier, minimum=0.0)
        _check_number("alpha_init", self.alpha_init, minimum=None)
        iters = self.sinkhorn_iters
        if isinstance(iters, bool) or not isinstance(iters, int) or iters < 1:
            raise ConfigError(f"sinkhorn_iters must be an integer of at least 1, got {iters!r}")
        off = self.sinkhorn_eps_mode == "none"
        if (off and self.sinkhorn_eps > 0) or (not off and self.sinkhorn_eps == 0):
            raise ConfigError(
                f"sinkhorn_eps={self.sinkhorn_eps!r} contradicts "
                f"sinkhorn_eps_mode={self.sinkhorn_eps_mode!r}: eps must be positive with "
                "'add' or 'clamp' and 0 with 'none'"
            )
        if self.sinkhorn_start_is_step and (self.sinkhorn_start, self.sinkhorn_order) != (
            "softmax",
            "row_col",
        ):
            raise ConfigError(
                "sinkhorn_start_is_step=True needs sinkhorn_start='softmax' and "
                f"sinkhorn_order='row_col', got {self.sinkhorn_start!r} and "
                f"{self.sinkhorn_order!r}: only a row softmax can replace a first row step"
            )

    def sinkhorn_axes(self) -> SinkhornAxes:
        """Returns the axes of the Sinkhorn-Knopp projection as its keyword arguments.

        Example:
            >>> get_convention("paper").sinkhorn_axes()["order"]
            'col_row'
        """
        return SinkhornAxes(
            order=self.sinkhorn_order,
            start=self.sinkhorn_start,
            start_is_step=self.sinkhorn_start_is_step,
            eps=self.sinkhorn_eps,
            eps_mode=self.sinkhorn_eps_mode,
        )

    def key(self) -> str:
        """Returns the axes that change results, as canonical JSON: equal numerics, equal keys.

        `name` and `alpha_init` are left out. Operators take it as their `rule`.

        Example:
            >>> Convention("mine").key() == get_convention("paper").key()
            True
        """
        axes = {axis: getattr(self, axis) for axis in _KEY_AXES}
        # An eps given as the integer 0 is the same number.
        axes.update({axis: float(axes[axis]) for axis in _FLOATS})
        return json.dumps(axes, separators=(",", ":"))

    @classmethod
    def from_key(cls, key: str) -> Convention:
        """Returns the convention of a `key`, named "custom"; the same object for the same key.

        Raises:
            ConfigError: the text is not a key.

        Example:
            >>> Convention.from_key(get_convention("liger").key()).pre_eps
            0.0
        """
        return _from_key(key)


_KEY_AXES = tuple(f.name for f in fields(Convention) if f.name not in ("name", "alpha_init"))
_FLOATS = ("sinkhorn_eps", "norm_eps", "pre_eps", "post_multiplier")


@lru_cache(maxsize=256)
def _from_key(key: str) -> Convention:
    try:
        axes = json.loads(key)
    except (TypeError, ValueError):
        axes = None
    if not isinstance(axes, dict) or set(axes) != set(_KEY_AXES):
        raise ConfigError(f"rule must be the text that Convention.key() returns, got {key!r}")
    return Convention("custom", **axes)


def _check_choice(axis: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{axis} must be one of {_listed(allowed)}, got {value!r}")


def _check_number(axis: str, value: object, *, minimum: float | None) -> None:
    # Comparisons rather than math.isfinite, which torch.compile cannot trace for dynamic floats.
    if isinstance(value, int | float) and not isinstance(value, bool):
        if -math.inf < value < math.inf and (minimum is None or value >= minimum):
            return
    bound = "" if minimum is None else f" of at least {minimum:g}"
    raise ConfigError(f"{axis} must be a finite number{bound}, got {value!r}")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)


def _softmax_rule(
    name: str,
    *,
    res_transposed: bool = True,
    sinkhorn_iters: int = 20,
    pre_eps: float = 1e-6,
    post_multiplier: float = 2.0,
    alpha_init: float = 1.0,
) -> Convention:
    """The Sinkhorn rule and the RMSNorm of DeepSeek-V4, which several peers share."""
    return Convention(
        name,
        res_transposed=res_transposed,
        sinkhorn_order="row_col",
        sinkhorn_start="softmax",
        sinkhorn_start_is_step=True,
        sinkhorn_eps=1e-6,
        sinkhorn_eps_mode="add",
        sinkhorn_iters=sinkhorn_iters,
        norm_eps=1e-6,
        pre_eps=pre_eps,
        post_multiplier=post_multiplier,
        alpha_init=alpha_init,
    )


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "paper": Convention("paper"),
        "deepseek_v4": _softmax_rule("deepseek_v4"),
        # TileKernels and TransformerEngine leave the gates' first values to the caller; these are
        # the paper's.
        "tilekernels": _softmax_rule(
            "tilekernels", sinkhorn_iters=10, post_multiplier=1.0, alpha_init=0.01
        ),
        "liger": _softmax_rule("liger", res_transposed=False, pre_eps=0.0),
        "transformer_engine": Convention(
            "transformer_engine",
            res_transposed=True,
            sinkhorn_order="row_col",
            norm_eps=2.0**-23,  # the machine epsilon of float32
        ),
    }
)
"""The conventions known by name, read-only."""


def get_convention(convention: str | Convention) -> Convention:
    """Returns a convention by its name, or the given `Convention` unchanged.

    Args:
        convention: a key of `CONVENTIONS`, or a `Convention` of one's own.

    Returns:
        The convention.

    Raises:
        ConfigError: the name is unknown, or the argument is of another type.

    Example:
        >>> get_convention("liger").res_transposed
        False
    """
    if isinstance(convention, Convention):
        return convention
    names = tuple(CONVENTIONS)
    if not isinstance(convention, str):
        raise ConfigError(
            f"convention must be a Convention or one of {_listed(names)}, "
            f"got {type(convention).__name__}"
        )
    if convention not in CONVENTIONS:
        spelled = convention.lower().replace("-", "_").replace(" ", "_")
        close = difflib.get_close_matches(spelled, names, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"convention must be one of {_listed(names)}, got {convention!r}{hint}")
    return CONVENTIONS[convention]
