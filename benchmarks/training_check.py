"""Trains a small language model in bf16 with generated kernels and with the reference formulas.

A byte-level model learns this repository's own pages, once for each seed (weights and order of the
text) and each way to run the connections. Passed if the kernels' mean losses differ from the
formulas' by no more than seeds do: at the end by less than two standard errors, anywhere on the
curve by less than three, or by less than --least. Then the first seed is trained again: every loss
and every parameter must be equal in every bit. torch is set to deterministic algorithms, since its
attention and embedding are not by themselves; the connections' kernels always are.

    python benchmarks/training_check.py --json out/training_check.json
    python benchmarks/training_check.py --device cpu --lower eager --channels 32 --steps 4
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts

import torch
from tabulate import tabulate
from timing import machine, need_gpu, write_json
from torch import Tensor, nn
from torch.nn import functional as F
from training_models import build, make_shape

import mhc_compile as mc
from mhc_compile.backend import mhc
from mhc_compile.backend.records import last_record

ROOT = Path(__file__).parents[1]


class ByteModel(nn.Module):
    """A causal model of bytes and its loss."""

    def __init__(self, blocks: nn.Module, channels: int) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(256, channels), blocks
        self.head = nn.Linear(channels, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """The mean cross entropy of each next byte of `text: [B, S + 1]`."""
        logits = self.head(self.blocks(self.embedding(text[:, :-1])))
        return F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())


def make_model(args: argparse.Namespace) -> ByteModel:
    """The transformed model, in bf16 but for the connections' parameters."""
    device = torch.device(args.device)
    shape = make_shape("dense", args.channels, args.blocks, args.length, args.batch)
    blocks = build(shape, device, torch.bfloat16)
    model = ByteModel(blocks, args.channels).to(device, torch.bfloat16)
    example = torch.zeros(1, 9, dtype=torch.long, device=device)
    return mc.transform(model, streams=args.streams, example_inputs=(example,)).train()


def start_anew(model: nn.Module, seed: int) -> None:
    """Draws all parameters again, so that what was compiled for the model stays."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def batches(args: argparse.Namespace, seed: int) -> Tensor:
    """Bytes for every step, `[steps, batch, length + 1]`."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = torch.tensor(list(b"".join(page.read_bytes() for page in pages)))
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - args.length, (args.steps, args.batch, 1), generator=draw)
    return text[starts + torch.arange(args.length + 1)].to(args.device)


def train(model: nn.Module, call: Any, seed: int, args: argparse.Namespace) -> Tensor:
    """The loss of each step, float32 on the CPU."""
    start_anew(model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.0, fused=True)
    losses = []
    for text in batches(args, seed):
        optimizer.zero_grad()
        loss = call(text)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # not read: that would wait for the device
    return torch.stack(losses).float().cpu()


def compare(kernels: Tensor, formulas: Tensor, window: int, least: float) -> dict[str, Any]:
    """Curves `[seeds, steps]` beside each other, by means over windows of steps.

    Returns:
        The final losses, the largest difference of the seeds' means anywhere in standard errors of
        the seeds' spread, and whether both differences are within the bounds.
    """
    a, b = (_windows(curves, window) for curves in (kernels, formulas))
    difference = (a.mean(0) - b.mean(0)).abs()
    error = ((a.var(0) + b.var(0)) / a.shape[0]).sqrt()
    allowed_end = max(least, 2 * float(error[-1]))
    within = difference <= torch.maximum(3 * error, torch.full_like(error, least))
    return {
        "kernels, final": a[:, -1].tolist(), "formulas, final": b[:, -1].tolist(),
        "difference": float(a[:, -1].mean() - b[:, -1].mean()),
        "same seed": float((a[:, -1] - b[:, -1]).abs().mean()),
        "standard error": float(error[-1]),
        "largest on the curve": float(difference.max()),
        "curve": {"kernels": a.mean(0).tolist(), "formulas": b.mean(0).tolist()},
        "ok": bool(float(difference[-1]) <= allowed_end and within.all()),
    }  # fmt: skip


def _windows(curves: Tensor, window: int) -> Tensor:
    steps = curves.shape[1] // window * window
    return curves[:, :steps].double().unflatten(1, (-1, window)).mean(2)


def first_difference(model: nn.Module, call: Any, args: argparse.Namespace) -> str:
    """Trains the first seed twice; what differs first, "" if every bit is equal."""
    seen = []
    for _ in range(2):
        losses = train(model, call, 0, args)
        seen.append((losses, [p.detach().clone() for p in model.parameters()]))
    (losses, parameters), (again, others) = seen
    if not torch.equal(losses, again):
        return f"the loss of step {int((losses != again).nonzero()[0, 0])}"
    names = [name for name, _ in model.named_parameters()]
    for name, a, b in zip(names, parameters, others, strict=True):
        if not torch.equal(a, b):
            return name
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, compares, prints; the exit code is 1 where something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--window", type=int, default=25, help="steps that are averaged")
    parser.add_argument("--least", type=float, default=2e-3, help="difference that always passes")
    parser.add_argument("--lower", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args(arguments)
    if args.device == "cuda":
        need_gpu()
    torch.use_deterministic_algorithms(True)
    model = make_model(args)
    curves, calls, ran = {}, {}, {}
    for name, choice in (("kernels", "auto"), ("formulas", "reference")):
        options = {"kernels": choice, "lower": args.lower}
        calls[name] = torch.compile(model, backend=mhc, options=options, fullgraph=True)
        start = time.perf_counter()
        curves[name] = torch.stack([train(model, calls[name], s, args) for s in range(args.seeds)])
        record = last_record()
        ran[name] = record.kernels if record else "unknown"
        print(f"{name} ({ran[name]}): {time.perf_counter() - start:.0f} s", flush=True)
    result = compare(curves["kernels"], curves["formulas"], args.window, args.least)
    write_json(args, {"ran": ran, "compared": result, "differs": None})  # if time runs out
    different = first_difference(model, calls["kernels"], args)
    write_json(args, {"ran": ran, "compared": result, "differs": different})
    rows = [[seed, *pair] for seed, pair in enumerate(
        zip(result["kernels, final"], result["formulas, final"], strict=True))]  # fmt: skip
    print(tabulate(rows, ["seed", "kernels, final loss", "formulas"], tablefmt="github",
                   floatfmt=".4f"))  # fmt: skip
    print(f"\nmeans differ by {result['difference']:+.4f} at the end, {result['same seed']:.4f} "
          f"with the same seed, standard error {result['standard error']:.4f}; largest difference "
          f"of means on the curve {result['largest on the curve']:.4f}: "
          f"{'within' if result['ok'] else 'BEYOND'} the noise of seeds")  # fmt: skip
    print(
        f"two runs with one seed: {different + ' differs' if different else 'equal in every bit'}"
    )
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if different or not result["ok"] or not math.isfinite(result["difference"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
