"""The options of `torch.compile(model, backend="mhc", options={...})`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mhc_compile._torch_compat import inductor_mode_options, inductor_option_names
from mhc_compile.codegen.tuning import MODES as TUNING
from mhc_compile.errors import ConfigError, check_choice, nearest

_CHOICES = {
    "lower": ("inductor", "aot_eager", "eager"),
    "kernels": ("auto", "triton", "reference"),
}
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_OBJECTIVES = ("off", "paper", "timeline", "budget")


@dataclass(frozen=True)
class Options:
    """How a graph is compiled.

    Attributes:
        recompute: "off", "paper", "timeline", "budget", a block size in sublayers, or a tuple of
            block sizes.
        memory_budget: bytes a rank, for "budget" alone.
        fuse: whether operators are fused.
        lower: what runs the graph: "inductor", "aot_eager" or "eager".
        kernels: "auto" runs generated Triton kernels where there are any and lets Inductor
            generate the steps elsewhere; "triton" insists on the former, "reference" on the latter.
        tune: how tiles of generated kernels are chosen, for the whole process from then on: "off",
            "cached" or "full", see `mhc_compile.codegen.tuning.set_tuning`; None leaves it.
        mode: as `mode=` of torch.compile, which cannot be given beside `options=`.
        inductor: Inductor's own settings, as its `options=`.
    """

    recompute: str | int | tuple[int, ...] = "off"
    memory_budget: int | None = None
    fuse: bool = True
    lower: str = "inductor"
    kernels: str = "auto"
    tune: str | None = None
    mode: str = "default"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def inductor_config(self) -> dict[str, Any]:
        """What mode and `inductor` ask of Inductor."""
        return {**inductor_mode_options(self.mode), **self.inductor}


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Builds `Options`.

    Raises:
        ConfigError: an option is unknown, has a value that it does not take, or needs another one.
    """
    given = dict(options or {})
    known = [f.name for f in fields(Options)]
    for name in given:
        if name not in known:
            hint = nearest(name, known) or f"; the options are {', '.join(known)}"
            raise ConfigError(f"backend='mhc' has no option {name!r}{hint}")
    if mode is not None:
        given["mode"] = mode
    if "recompute" in given and isinstance(given["recompute"], list):
        given["recompute"] = tuple(given["recompute"])
    result = Options(**given)
    _check(result)
    return result


def _check(options: Options) -> None:
    for name, allowed in _CHOICES.items():
        check_choice(f"the option {name}", getattr(options, name), allowed)
    check_choice("the option mode", options.mode, _MODES)
    if options.tune is not None:
        check_choice("the option tune", options.tune, TUNING)
    if not isinstance(options.fuse, bool):
        raise ConfigError(f"the option fuse must be True or False, got {options.fuse!r}")
    _check_recompute(options)
    if not isinstance(options.inductor, Mapping):
        raise ConfigError(
            f"the option inductor must be a dict of Inductor's settings, got {options.inductor!r}"
        )
    for name in options.inductor:
        names = inductor_option_names()
        if name not in names:
            raise ConfigError(f"Inductor has no setting {name!r}{nearest(name, names)}")


def _check_recompute(options: Options) -> None:
    value, budget = options.recompute, options.memory_budget
    sizes = value if isinstance(value, tuple) else (value,)
    if isinstance(value, str):
        check_choice("the option recompute", value, _OBJECTIVES)
    elif not sizes or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
        raise ConfigError(
            f"the option recompute must be one of {', '.join(map(repr, _OBJECTIVES))}, a block "
            f"size of at least 1 or a tuple of them, got {value!r}"
        )
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
        raise ConfigError(f"the option memory_budget must be a number of bytes, got {budget!r}")
    if budget is not None and budget < 1:
        raise ConfigError(f"the option memory_budget must be at least 1 byte, got {budget!r}")
    if (value == "budget") != (budget is not None):
        raise ConfigError(
            "the options recompute='budget' and memory_budget=BYTES belong together: got "
            f"recompute={value!r} and memory_budget={budget!r}"
        )
