"""Compares backend="mhc" with backend="inductor" and eager execution on one transformed model.

A GPT of `--blocks` blocks, forward and backward of a training step without the optimizer. Results
are compared first; then the versions run in turn in one process, and the table shows medians and
ratios. On a machine with other work, `--threads 1 --clock cpu` counts the time on the processor.

    python benchmarks/backend.py --tokens 4096 --streams 4 --channels 768 --blocks 6
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import mhc_compile as mc
from mhc_compile.backend import mhc

Step = Callable[[], Tensor]


class Block(nn.Module):
    """A pre-norm block: causal attention and a GELU MLP."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(channels, eps=1e-6), nn.RMSNorm(channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.up = nn.Linear(channels, 4 * channels, bias=False)
        self.down = nn.Linear(4 * channels, channels, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        """Causal self-attention of `x: [B, S, C]`."""
        batch, length, channels = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, S, C]` to the same."""
        x = x + self.attend(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def build(args: argparse.Namespace) -> nn.Module:
    """The plain model: blocks and a final norm, in `--dtype`."""
    blocks = [Block(args.channels, args.channels // 64 or 1) for _ in range(args.blocks)]
    norm = nn.RMSNorm(args.channels, eps=1e-6)
    return nn.Sequential(*blocks, norm).to(args.device, getattr(torch, args.dtype))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512, help="of one sequence")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--plain", action="store_true", help="also the model without mHC")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    x = torch.randn(
        args.tokens // args.length, args.length, args.channels, device=args.device, dtype=dtype
    )
    plain = build(args)
    model = mc.transform(build(args), streams=args.streams, example_inputs=(x[:1, :8],))
    with torch.no_grad():
        for _, parameter in mc.mhc_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    models: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": model,
        "inductor": torch.compile(model, backend="inductor"),
        "mhc": torch.compile(model, backend=mhc),
    }
    if args.plain:
        models["plain, inductor"] = torch.compile(plain, backend="inductor")
    steps = {name: _step(call, x) for name, call in models.items()}
    expected = _results(model, steps["eager"])
    for name, step in steps.items():
        if "plain" not in name:
            error = float((_results(model, step) - expected).norm() / expected.norm())
            if not error <= (1e-4 if dtype == torch.float32 else 5e-2):
                raise SystemExit(f"{name} differs from eager by {error:.1e}")
    times = _measure(steps, args)
    rows = [
        [name, *(statistics.median(part) for part in zip(*times[name], strict=True))]
        for name in steps
    ]
    base = {row[0]: row[3] for row in rows}["inductor"]
    table = [[*row, base / row[3]] for row in rows]
    print(
        tabulate(table, ["", "forward ms", "backward ms", "both ms", "x inductor"], floatfmt=".2f")
    )
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}, "
        f"{args.tokens} tokens, n = {args.streams}, C = {args.channels}, {args.blocks} blocks, "
        f"{args.dtype}, medians of {args.repeats} repeats in turn, {args.clock} time"
    )


def _step(call: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    return lambda: call(x.detach().requires_grad_())


def _results(model: nn.Module, step: Step) -> Tensor:
    """The output and all gradients, in one vector."""
    model.zero_grad()
    out = step()
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).sin()
    # Not the mean square: of a norm's results it is 1, and its gradients are rounding errors.
    (out.float() * weights).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([t.detach().float().flatten() for t in (out, *grads)])


def _measure(
    steps: dict[str, Step], args: argparse.Namespace
) -> dict[str, list[tuple[float, ...]]]:
    """Milliseconds of forward, backward and both, for each repeat."""

    def now() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() if args.clock == "wall" else time.process_time()

    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for repeat in range(args.repeats + 1):
        for name, step in steps.items():
            start = now()
            out = step()
            middle = now()
            out.backward(torch.ones_like(out))
            end = now()
            if repeat > 0:  # the first one warms up
                ms = 1e3 * (middle - start), 1e3 * (end - middle)
                times[name].append((*ms, sum(ms)))
    return times


if __name__ == "__main__":
    main()
