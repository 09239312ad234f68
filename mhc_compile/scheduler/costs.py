"""`Costs`: how long each kind of action takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mhc_compile.errors import ConfigError
from mhc_compile.scheduler.actions import KINDS


@dataclass(frozen=True)
class Costs:
    """Durations of a rank's actions, in any one unit.

    Attributes:
        F: a chunk's forward.
        B: its whole backward.
        I: the gradient of its input alone.
        W: the gradient of its weights alone.
        FB: a forward overlapped with a backward.
        latency: what a message to another rank takes; to a stage of the same rank, nothing.
        transfer: besides, how long it keeps its sender's link busy; the next one waits.
        f_ready: when an "FB"'s forward output can be sent, counted from its start; None: its end.
        b_ready: the same of its backward.
        f_needed: when an "FB" first reads its forward's input, counted from its start.
        b_needed: the same of its backward's gradient.
        g_needed: the same of a "B" or "I": recompute before it needs no message (Sec. 4.3.3).

    Raises:
        ConfigError: a duration is negative, infinite or not a number, or something is needed after
            the end.
    """

    F: float = 1.0
    B: float = 2.0
    I: float = 1.0  # noqa: E741
    W: float = 1.0
    FB: float = 3.0
    latency: float = 0.0
    transfer: float = 0.0
    f_ready: float = None  # type: ignore[assignment]  # resolved in __post_init__
    b_ready: float = None  # type: ignore[assignment]
    f_needed: float = 0.0
    b_needed: float = 0.0
    g_needed: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in ("f_ready", "b_ready"):
                value = self.FB
            object.__setattr__(self, field.name, check_duration(field.name, value))
        for name, end in (("f_needed", self.FB), ("b_needed", self.FB),
                          ("g_needed", min(self.B, self.I))):  # fmt: skip
            if getattr(self, name) > end:
                raise ConfigError(
                    f"cost {name} must be at most {end:g}, the end of its action, got "
                    f"{getattr(self, name):g}"
                )

    def needed(self, kind: str, made: str) -> float:
        """When an action first reads what another stage made: a forward ("F") or a backward."""
        if kind == "FB":
            return self.f_needed if made == "F" else self.b_needed
        return self.g_needed if kind in ("B", "I") and made != "F" else 0.0

    def of_kinds(self) -> np.ndarray:
        """Durations in the order of `KINDS`."""
        return np.array([getattr(self, kind) for kind in KINDS])


def check_duration(name: str, value: Any) -> float:
    """Returns the duration as a float.

    Raises:
        ConfigError: it is negative, infinite or not a number.
    """
    try:
        duration = float("nan") if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        duration = float("nan")
    if not (math.isfinite(duration) and duration >= 0):
        raise ConfigError(f"cost {name} must be a finite number of at least 0, got {value!r}")
    return duration + 0.0  # no negative zero


def read_costs(costs: Mapping[str, Any] | Costs | None, latency: float | None = None) -> Costs:
    """Returns `costs` with what follows from the rest filled in: B = I + W and FB = F + B.

    Raises:
        ConfigError: a name is unknown, a duration makes no sense or does not follow.
    """
    if costs is None:
        costs = Costs()
    if isinstance(costs, Costs):
        given = {field.name: getattr(costs, field.name) for field in fields(costs)}
    elif isinstance(costs, Mapping):
        given = {str(name): value for name, value in costs.items()}
    else:
        raise ConfigError(
            f"costs must be a dict such as {{'F': 1, 'B': 2, 'I': 1, 'W': 1, 'FB': 3}}, got "
            f"{type(costs).__name__}"
        )
    names = [field.name for field in fields(Costs)]
    if unknown := sorted(set(given) - set(names)):
        raise ConfigError(f"costs has no {unknown[0]!r}; names: {', '.join(names)}")
    for name, value in given.items():
        check_duration(name, value)
    for name, sign, terms in (
        ("B", 1, ("I", "W")), ("I", -1, ("B", "W")), ("W", -1, ("B", "I")), ("FB", 1, ("F", "B")),
    ):  # fmt: skip
        if name not in given and set(terms) <= set(given):
            given[name] = given[terms[0]] + sign * given[terms[1]]
    if missing := sorted(set(KINDS) - set(given)):
        raise ConfigError(
            f"costs must give {', '.join(missing)} too; what may be left out is what "
            "B = I + W or FB = F + B gives"
        )
    if latency is not None:
        given["latency"] = latency
    return Costs(**given)
