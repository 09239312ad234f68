"""`measure_op_costs`: how long a layer's parts take here; only messages are modelled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile._torch_compat import occupy_gpu
from mhc_compile.config import MHCConfig
from mhc_compile.errors import ConfigError
from mhc_compile.pipeline.split_backward import WeightWork, backward_inputs
from mhc_compile.runtime.modules import HyperConnection
from mhc_compile.runtime.streams import apply_post_res, apply_pre, coefficients
from mhc_compile.scheduler.costs import check_duration
from mhc_compile.scheduler.op_costs import OpCosts

WARM_UPS = 2
LAUNCHING = 20_000_000  # cycles, some 10 ms, in which Python launches a step's kernels
HEAD = 128  # channels of an attention head, where they divide C


def measure_op_costs(
    *,
    hidden: int,
    tokens: int,
    streams: int = 4,
    layers: int = 1,
    attention: nn.Module | None = None,
    mlp: nn.Module | None = None,
    link_us: float = 0.0,
    link_gbs: float = 40.0,
    contention: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 7,
) -> OpCosts:
    """Times a dense layer's forward, input gradient and weight gradient on one device.

    Medians over repeats: on CUDA between events, of kernels without gaps unless a sublayer itself
    waits for the GPU, else of the wall clock. mHC's parts are the operators that a transformed
    model runs in eager mode. The message is modelled as `link_us + bytes / link_gbs`, the quantum
    as a 32nd of attention, recompute as the sum of its measured parts; there is no all-to-all.

    Args:
        hidden: C.
        tokens: of a microbatch, one sequence.
        streams: n.
        layers: of a stage.
        attention: what is timed as attention, `[1, tokens, C]` to the same; None is causal
            attention in heads of 128.
        mlp: the same for the MLP; None is a SwiGLU of 8/3 C.
        link_us: alpha, what a message between neighbouring ranks takes besides its bytes.
        link_gbs: beta, GB/s of such a link.
        contention: c slows compute by 1 + c while any communication runs.
        device: None is the GPU if there is one.
        dtype: of the streams and of the two modules' weights.
        repeats: of each measurement.

    Returns:
        The table; its `provenance` says of every number whether it is measured or modelled.

    Raises:
        ConfigError: a size or a rate makes no sense.
    """
    for name, value in (("hidden", hidden), ("tokens", tokens), ("streams", streams),
                        ("repeats", repeats)):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    if check_duration("link_gbs", link_gbs) == 0:
        raise ConfigError("link_gbs must be greater than 0")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    clock = _Clock(where, repeats)
    measured: dict[str, float] = {}
    for name, module in (
        ("attention", attention or _Attention(hidden)), ("mlp", mlp or _MLP(hidden))
    ):  # fmt: skip
        parts = clock.module(module.to(where, dtype), (1, tokens, hidden), dtype)
        measured |= {f"{name}_{kind}": part for kind, part in zip("FBW", parts, strict=True)}
    measured |= clock.connection(hidden, tokens, streams, dtype)
    size = streams * hidden * tokens * dtype.itemsize
    modelled = {
        "send": check_duration("link_us", link_us) + size / link_gbs * 1e-3,
        "recv": 0.0, "dispatch": 0.0, "combine": 0.0, "contention": contention,
        "quantum": measured["attention_F"] / 32,
    }  # fmt: skip
    derived = {"recompute": 2 * (measured["pre_F"] + measured["post_res_F"])}
    table: dict[str, Any] = {**measured, **modelled, **derived}
    return OpCosts(
        **table, layers=layers,
        provenance=f"measured on {_name(where)}, {str(dtype).removeprefix('torch.')}, torch "
        f"{torch.__version__}: {', '.join(measured)}; the sum of measured parts: recompute; "
        f"modelled: {', '.join(modelled)}; given: layers",
    )  # fmt: skip


class _Clock:
    """Medians of times in us."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def median(self, run: Callable[[], Sequence[Callable[[], Any]]]) -> list[float]:
        """Times the steps that `run` makes anew for each repeat."""
        rows = []
        for number in range(WARM_UPS + self.repeats):
            taken = [self._once(step) for step in run()]
            rows += [taken] if number >= WARM_UPS else []
        return [statistics.median(column) for column in zip(*rows, strict=True)]

    def _once(self, step: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e6
        with torch.cuda.device(self.device):  # whose stream all of this is on
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            occupy_gpu(LAUNCHING)
            begin.record()
            step()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def module(self, module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[float]:
        """Forward, gradient of the input, gradients of the weights."""

        def run() -> list[Callable[[], Any]]:
            module.zero_grad()
            x = torch.randn(shape, device=self.device, dtype=dtype, requires_grad=True)
            made: list[Tensor] = []
            left: list[WeightWork] = []
            gradient = torch.randn(shape, device=self.device, dtype=dtype)
            return [
                lambda: made.append(module(x)),
                lambda: left.append(backward_inputs(made, [gradient], [x], module.parameters())[1]),
                lambda: left.pop().run(),
            ]

        return self.median(run)

    def connection(
        self, hidden: int, tokens: int, streams: int, dtype: torch.dtype
    ) -> dict[str, float]:
        """The connection's steps around one sublayer, forward and backward; 0 for one stream."""
        if streams == 1:
            return {
                f"{name}_{k}": 0.0 for name in ("coefficients", "pre", "post_res") for k in "FB"
            }
        config = MHCConfig(streams=streams)
        shape = (1, tokens, streams, hidden)
        layer = HyperConnection(hidden, config, device=self.device)
        rule = config.rule.key()
        x = torch.randn(shape, device=self.device, dtype=dtype)
        f = torch.randn(shape[:2] + shape[3:], device=self.device, dtype=dtype)
        pre, post, res = (
            t.detach() for t in coefficients(x, layer.phi, layer.alpha, layer.bias, rule)
        )
        weights = layer.phi, layer.alpha, layer.bias
        steps: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
            "coefficients": (partial(coefficients, rule=rule), (x, *weights)),
            "pre": (apply_pre, (x, pre)),
            "post_res": (apply_post_res, (x, f, post, res)),
        }
        found: dict[str, float] = {}
        for name, (step, given) in steps.items():
            forward, backward = self.median(partial(_both, step, given))
            found |= {f"{name}_F": forward, f"{name}_B": backward}
        return found


def _both(step: Callable[..., Any], given: tuple[Tensor, ...]) -> list[Callable[[], Any]]:
    """An operator's forward and its backward with respect to all it gets."""
    leaves = [t.detach().requires_grad_() for t in given]
    made: list[Tensor] = []

    def forward() -> None:
        out = step(*leaves)
        made.extend(out if isinstance(out, tuple) else (out,))

    return [
        forward, lambda: torch.autograd.grad(made, leaves, [torch.ones_like(t) for t in made])
    ]  # fmt: skip


class _Attention(nn.Module):
    """Causal attention, its four projections included."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = hidden // HEAD if hidden % HEAD == 0 else 1
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, C] to the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    """SwiGLU of 8/3 C, rounded up to 64."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        width = -(-8 * hidden // 192) * 64
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, C] to the same."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
