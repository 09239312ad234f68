"""The options of `torch.compile(model, backend="mhc", options={...})`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mhc_compile._torch_compat import inductor_mode_options, inductor_option_names
from mhc_compile.codegen.tuning import MODES as TUNING
from mhc_compile.errors import ConfigError, check_choice, nearest
from mhc_compile.scheduler.choose_plan import Recompute, check_recompute

_CHOICES = {
    "lower": ("inductor", "aot_eager", "eager"),
    "kernels": ("auto", "triton", "reference"),
}
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Options:
    """How a graph is compiled.

    Attributes:
        recompute: "off", "paper", "timeline", "budget", a block size in sublayers, or a tuple of
            block sizes; None, where it was not given, is "paper" without a warning where nothing
            can be recomputed.
        memory_budget: bytes a rank, for "budget" alone.
        fuse: whether operators are fused.
        overlap: whether forward and backward are cut where the overlap plan changes servers, and
            their pieces run on streams of their own; compiled one by one.
        lower: what runs the graph: "inductor", "aot_eager" or "eager".
        kernels: "auto" runs generated Triton kernels where there are any and lets Inductor
            generate the steps elsewhere; "triton" insists on the former, "reference" on the latter.
        tune: how tiles of generated kernels are chosen, for the whole process from then on: "off",
            "cached" or "full", see `mhc_compile.codegen.tuning.set_tuning`; None leaves it.
        mode: as `mode=` of torch.compile, which cannot be given beside `options=`.
        inductor: Inductor's own settings, as its `options=`.
    """

    recompute: Recompute | None = None
    memory_budget: int | None = None
    fuse: bool = True
    overlap: bool = False
    lower: str = "inductor"
    kernels: str = "auto"
    tune: str | None = None
    mode: str = "default"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> Recompute:
        """What chooses the blocks."""
        return "paper" if self.recompute is None else self.recompute

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
    recompute = check_recompute(given.get("recompute", "paper"), given.get("memory_budget"))
    result = Options(**(given | ({"recompute": recompute} if "recompute" in given else {})))
    _check(result)
    return result


def _check(options: Options) -> None:
    for name, allowed in _CHOICES.items():
        check_choice(f"the option {name}", getattr(options, name), allowed)
    check_choice("the option mode", options.mode, _MODES)
    if options.tune is not None:
        check_choice("the option tune", options.tune, TUNING)
    for name in ("fuse", "overlap"):
        value = getattr(options, name)
        if not isinstance(value, bool):
            raise ConfigError(f"the option {name} must be True or False, got {value!r}")
    if not isinstance(options.inductor, Mapping):
        raise ConfigError(
            f"the option inductor must be a dict of Inductor's settings, got {options.inductor!r}"
        )
    for name in options.inductor:
        names = inductor_option_names()
        if name not in names:
            raise ConfigError(f"Inductor has no setting {name!r}{nearest(name, names)}")
    graphs = options.inductor_config().get("triton.cudagraphs")
    if options.overlap and (options.lower == "eager" or graphs):
        raise ConfigError(
            "overlap=True needs lower='inductor' or 'aot_eager' and no CUDA graphs, got "
            f"lower={options.lower!r}, mode={options.mode!r}, inductor={options.inductor!r}"
        )
