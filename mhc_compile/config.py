"""`MHCConfig`: what connection replaces a residual add, and with which numerical rules."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mhc_compile.conventions import Convention, get_convention
from mhc_compile.errors import ConfigError, check_choice, nearest

CONFIG_VERSION = 1
MAX_STREAMS = 16
CONNECTIONS = ("mhc", "hc")
INITS = ("preserve", "paper")
COLLAPSES = ("learned", "mean", "sum", "head")
_AXES = tuple(f.name for f in dataclasses.fields(Convention) if f.name != "name")


@dataclass(frozen=True)
class MHCConfig:
    """The design of the residual connections that `transform` installs.

    Fields after `collapse` are the numerical axes in which implementations of mHC differ; one
    left at None takes the value of `convention`, so that a read always gives the value in force.

    Attributes:
        streams: n, the number of residual streams, 1 to 16; n = 1 is the plain residual.
        connection: "mhc" (arXiv 2512.24880) or "hc", the unconstrained connection of
            arXiv 2409.19606.
        convention: a named set of axes: "paper", "deepseek_v4", "tilekernels", "liger" or
            "transformer_engine".
        init: "preserve" starts with the function of the original model and unequal streams;
            "paper" starts with the gates `alpha_init`, for training from scratch.
        sinkhorn_iters: Sinkhorn-Knopp iterations.
        collapse: how the streams become one after the last sublayer: "learned" (one weight per
            stream), "mean", "sum" or "head" (DeepSeek-V4's, weights computed from the streams of
            each token). "sum" multiplies the final state by n, so init="preserve" starts from
            n-th parts.

    Raises:
        ConfigError: a field is out of range or two contradict each other.

    Example:
        >>> MHCConfig(streams=2).sinkhorn_iters
        20
    """

    streams: int = 4
    connection: str = "mhc"
    convention: str = "paper"
    init: str = "preserve"
    sinkhorn_iters: int = None  # type: ignore[assignment]  # resolved in __post_init__
    collapse: str = "learned"
    res_transposed: bool = None  # type: ignore[assignment]
    sinkhorn_order: str = None  # type: ignore[assignment]
    sinkhorn_start: str = None  # type: ignore[assignment]
    sinkhorn_start_is_step: bool = None  # type: ignore[assignment]
    sinkhorn_eps: float = None  # type: ignore[assignment]
    sinkhorn_eps_mode: str = None  # type: ignore[assignment]
    norm_eps: float = None  # type: ignore[assignment]
    norm_eps_place: str = None  # type: ignore[assignment]
    pre_eps: float = None  # type: ignore[assignment]
    post_multiplier: float = None  # type: ignore[assignment]
    alpha_init: float = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Takes open axes from the convention and checks every field."""
        streams = self.streams
        if isinstance(streams, bool) or not isinstance(streams, int):
            raise ConfigError(
                f"streams must be an integer from 1 to {MAX_STREAMS}, got {streams!r}"
            )
        if not 1 <= streams <= MAX_STREAMS:
            raise ConfigError(f"streams must be from 1 to {MAX_STREAMS}, got {streams}")
        check_choice("connection", self.connection, CONNECTIONS)
        check_choice("init", self.init, INITS)
        check_choice("collapse", self.collapse, COLLAPSES)
        if not isinstance(self.convention, str):
            raise ConfigError(
                f"convention must be a name, got {type(self.convention).__name__}; pass single "
                "axes as fields, e.g. MHCConfig(convention='paper', norm_eps=1e-6)"
            )
        base = get_convention(self.convention)
        for axis in _AXES:
            if getattr(self, axis) is None:
                object.__setattr__(self, axis, getattr(base, axis))
        self.rule  # noqa: B018  # Convention's own checks
        if self.init == "preserve" and self.connection == "mhc" and self.post_multiplier <= 1:
            raise ConfigError(
                "init='preserve' needs post gates of exactly 1, which post_multiplier="
                f"{self.post_multiplier:g} (convention {self.convention!r}) reaches only at an "
                "infinite bias; use init='paper' or post_multiplier=2.0"
            )

    @property
    def rule(self) -> Convention:
        """The axes as a `Convention`."""
        return Convention(self.convention, **{axis: getattr(self, axis) for axis in _AXES})

    def replace(self, **overrides: Any) -> MHCConfig:
        """Returns a copy with some fields changed.

        A new `convention` brings its own axes; axes named in `overrides` stay as given.

        Raises:
            ConfigError: an override is not a field, with the nearest field's name.
        """
        _check_names(overrides)
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if overrides.get("convention", self.convention) != self.convention:
            kept.update(dict.fromkeys(_AXES))
        return MHCConfig(**{**kept, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-safe dict with the format's version, every axis resolved."""
        return {"version": CONFIG_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> MHCConfig:
        """Builds a config from `to_dict`'s result.

        Raises:
            ConfigError: the version is newer than this library, or a key is unknown.
        """
        fields = dict(d)
        version = fields.pop("version", None)
        if version != CONFIG_VERSION:
            raise ConfigError(
                f"config version must be {CONFIG_VERSION}, got {version!r}; it was written by "
                "another version of mhc_compile"
            )
        _check_names(fields)
        return cls(**fields)


def _check_names(fields: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(MHCConfig)]
    for name in fields:
        if name not in known:
            hint = nearest(name, known) or f"; fields: {', '.join(known)}"
            raise ConfigError(f"{name!r} is not a field of MHCConfig{hint}")
