"""How the connections of a model pass signals on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from mhc_compile.errors import NotTransformedError
from mhc_compile.passes.install_blocks import rewritten_blocks
from mhc_compile.runtime.modules import HyperConnection


@dataclass(frozen=True)
class SiteStability:
    """How one connection, and all connections of its stream up to it, pass signals on.

    Gains are norms, taken at the token where they are largest: `forward_gain` is the largest
    absolute row sum of H_res, `backward_gain` the largest absolute column sum. `composite_*` are
    those of the product of H_res from the stream's first sublayer to this one. `error` is the
    largest deviation of a row or column sum from 1. `divergence` tells how far the streams that
    enter differ: ||x_i - mean|| / ||mean||, root mean square over streams and tokens.
    """

    name: str
    stream: int
    forward_gain: float
    backward_gain: float
    error: float
    composite_forward_gain: float
    composite_backward_gain: float
    divergence: float


@dataclass(frozen=True)
class StabilityReport:
    """The stability of every connection of a model, in execution order."""

    sites: tuple[SiteStability, ...]

    @property
    def forward_gain(self) -> float:
        """The composite forward gain over whole streams, the largest of them."""
        return max(s.composite_forward_gain for s in self._last())

    @property
    def backward_gain(self) -> float:
        """The composite backward gain over whole streams, the largest of them."""
        return max(s.composite_backward_gain for s in self._last())

    def _last(self) -> list[SiteStability]:
        return list({site.stream: site for site in self.sites}.values())

    def to_json(self) -> str:
        """The report as a JSON object with `sites`, `forward_gain` and `backward_gain`."""
        return json.dumps({
            "forward_gain": self.forward_gain, "backward_gain": self.backward_gain,
            "sites": [asdict(site) for site in self.sites],
        }, indent=2)  # fmt: skip

    def __str__(self) -> str:
        headers = ("site", "stream", "forward", "backward", "error", "composite forward",
                   "composite backward", "divergence")  # fmt: skip
        rows = [tuple(asdict(site).values()) for site in self.sites]
        return tabulate(rows, headers=headers, floatfmt=".3g")


def stability(model: nn.Module, *inputs: Any, **kwargs: Any) -> StabilityReport:
    """Measures how the connections of a model pass signals on, on one forward.

    The model runs once in evaluation mode without gradients. With mHC every gain is 1 up to the
    error that finitely many Sinkhorn iterations leave in the column sums; with HC the composite
    gains grow with depth.

    Args:
        model: a transformed model, or one that is built of `HyperConnection` modules.
        *inputs: positional arguments of its forward.
        **kwargs: keyword arguments of its forward.

    Returns:
        One entry a connection, in execution order.

    Raises:
        NotTransformedError: no `HyperConnection` with two streams or more ran.
    """
    probe = _Probe(model)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), probe:
            model(*inputs, **kwargs)
    finally:
        for module, mode in modes:
            module.training = mode
    if not probe.sites:
        raise NotTransformedError(
            f"no hyper-connection with two or more streams ran in {type(model).__name__}; call "
            "mhc_compile.transform(model) first"
        )
    return StabilityReport(tuple(probe.sites))


class _Probe:
    """Forward hooks on all connections, for the time of a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self.labels = dict(_labels(model))
        self.modules = [m for m in model.modules() if isinstance(m, HyperConnection)]
        self.products: dict[int, Tensor] = {}
        self.sites: list[SiteStability] = []

    def __enter__(self) -> None:
        self.handles = [
            m.register_forward_hook(self._measure) for m in self.modules if m.streams > 1
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _measure(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name, stream = self.labels[id(module)]
        x, res = args[0], output[2].double()
        before = self.products.get(stream)
        product = res if before is None or before.shape != res.shape else res @ before
        self.products[stream] = product
        rows, columns = res.sum(-1), res.sum(-2)
        self.sites.append(SiteStability(
            name, stream, _gain(res, -1), _gain(res, -2),
            max(_largest(rows - 1), _largest(columns - 1)), _gain(product, -1), _gain(product, -2),
            _divergence(x.double()),
        ))  # fmt: skip


def _labels(model: nn.Module) -> Iterator[tuple[int, tuple[str, int]]]:
    for name, module in model.named_modules():
        if isinstance(module, HyperConnection):
            yield id(module), (name, 0)
    for block, rewrite in rewritten_blocks(model).values():
        for number, site in enumerate(rewrite.plan.sites if rewrite.config.streams > 1 else ()):
            connection = block.get_submodule(f"mhc.{number}")
            yield id(connection), (site.name, site.stream)


def _gain(matrix: Tensor, dim: int) -> float:
    return _largest(matrix.abs().sum(dim))


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _divergence(x: Tensor) -> float:
    mean = x.mean(-2, keepdim=True)
    spread = (x - mean).square().mean() / mean.square().mean().clamp_min(1e-300)
    return float(spread.sqrt())
