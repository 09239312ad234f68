"""Trains one model three ways, plain, HC and mHC, on real text, and compares them.

    python examples/train_text.py                       # GPT-2 style, Python's standard library
    python examples/train_text.py --steps 1000 --streams 8 --device cuda
    python examples/train_text.py --model path/to/hf_model --text path/to/text

Every version starts from the same weights and sees the same batches in the same order.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import sysconfig
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from plots import plot_gains, plot_loss_gap
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import mhc_compile as mc

VERSIONS = {"baseline": None, "HC": "hc", "mHC": "mhc"}
SPIKE = 2.0
"""A step counts as a spike if its gradient norm exceeds this many times the median of the 20
steps before it."""


@dataclass
class Run:
    """What one version showed."""

    version: str
    sites: int
    parameters: int
    added: int
    step0_difference: float
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    validation_loss: float = float("nan")
    tokens_per_second: float = float("nan")
    forward_gain: float = 1.0
    backward_gain: float = 1.0
    gains: list[tuple[float, float]] = field(default_factory=list)

    @property
    def spikes(self) -> int:
        """Steps whose gradient norm stands out, see `SPIKE`."""
        norms = self.gradient_norms
        return sum(
            norms[i] > SPIKE * statistics.median(norms[i - 20 : i]) for i in range(20, len(norms))
        )

    def row(self) -> list[Any]:
        """The run's line of the table."""
        return [
            self.version, self.sites, f"{self.added:,}",
            f"{self.step0_difference:.1e}" if self.sites else "-",
            f"{statistics.mean(self.losses[-10:]):.4f}", f"{self.validation_loss:.4f}", self.spikes,
            f"{self.forward_gain:.3f}", f"{self.backward_gain:.3f}",
            f"{self.tokens_per_second:,.0f}",
        ]  # fmt: skip


def main() -> None:
    """Reads the arguments, trains all versions, prints and saves the comparison."""
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    train, validation = load_text(args.text)
    base = build_model(args).to(args.device)
    print(f"{type(base).__name__}, {count(base):,} parameters, on {args.device}; "
          f"text: {len(train):,} bytes to train, {len(validation):,} to validate")  # fmt: skip
    runs = []
    for version, connection in VERSIONS.items():
        model = copy.deepcopy(base)
        run = Run(version, 0, count(base), 0, 0.0)
        probe = batch(validation, args, step=0)
        if connection is not None:
            before = logits(model, probe)
            mc.transform(model, example_inputs={"input_ids": probe}, connection=connection,
                         streams=args.streams)  # fmt: skip
            run.sites = len(mc.find_residuals(base, {"input_ids": probe}))
            run.added = count(model) - count(base)
            run.step0_difference = float((logits(model, probe) - before).abs().max())
        train_model(model, run, train, validation, args)
        runs.append(run)
    save(runs, args)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", help="folder (or id) of a Hugging Face causal language model; "
                        "its architecture is trained from fresh weights")  # fmt: skip
    parser.add_argument("--text", type=Path, help="a file, or a folder whose files are read; "
                        "default: Python's standard library")  # fmt: skip
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens (bytes) in a sequence")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    args = parser.parse_args()
    if args.steps < 1 or args.batch < 1 or args.length < 2:
        parser.error("--steps and --batch must be at least 1, --length at least 2")
    if not 2 <= args.streams <= 16:
        parser.error("--streams must be from 2 to 16; one stream is the baseline itself")
    return args


def build_model(args: argparse.Namespace) -> nn.Module:
    """A model of an existing class with fresh weights; bytes are its tokens."""
    if args.model is None:
        config: Any = transformers.GPT2Config(
            n_layer=6, n_embd=128, n_head=4, vocab_size=256, n_positions=args.length,
            bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    else:
        config = transformers.AutoConfig.from_pretrained(args.model)
        if config.get_text_config().vocab_size < 256:
            sys.exit(f"{args.model}: bytes need a vocabulary of at least 256")
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def load_text(path: Path | None) -> tuple[Tensor, Tensor]:
    """Bytes to train and to validate on; whole files go to one side or the other."""
    root = path or Path(sysconfig.get_path("stdlib"))
    if root.is_file():
        data = torch.frombuffer(bytearray(root.read_bytes()), dtype=torch.uint8)
        cut = int(len(data) * 0.9)
        return data[:cut], data[cut:]
    files = sorted(
        root.glob("*.py") if path is None else (p for p in root.rglob("*") if p.is_file())
    )
    sides: tuple[bytearray, bytearray] = (bytearray(), bytearray())
    for file in files:
        sides[zlib.crc32(file.name.encode()) % 10 == 0].extend(file.read_bytes())
    if min(map(len, sides)) < 10_000:
        sys.exit(f"{root}: too little text; give a folder with more files, or one file")
    train, validation = (torch.frombuffer(side, dtype=torch.uint8) for side in sides)
    return train, validation


def batch(data: Tensor, args: argparse.Namespace, step: int) -> Tensor:
    """The batch of a step, `[batch, length]`, the same for every version."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(data) - args.length, (args.batch,), generator=generator)
    rows = torch.stack([data[s : s + args.length] for s in starts.tolist()])
    return rows.long().to(args.device)


def train_model(
    model: nn.Module, run: Run, train: Tensor, validation: Tensor, args: argparse.Namespace
) -> None:
    """Trains one version with AdamW, warm-up and cosine decay; fills in its results."""
    optimizer = make_optimizer(model, args.rate)
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.steps - warmup)),
    ], [warmup])  # fmt: skip
    model.train()
    started = time.perf_counter()
    progress = tqdm(range(args.steps), desc=f"{run.version:>8}", unit="step", ncols=90,
                    mininterval=0.5 if sys.stderr.isatty() else 15)  # fmt: skip
    for step in progress:
        ids = batch(train, args, step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.losses.append(float(loss.detach()))
        run.gradient_norms.append(float(norm))
        progress.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
    run.tokens_per_second = args.steps * args.batch * args.length / (time.perf_counter() - started)
    evaluate(model, run, validation, args)


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Weight decay for matrices, none for the rest and for the connections.

    phi learns at a tenth of the rate: Adam moves each of its n C rows by the rate, so the
    coefficients, sums over these rows, would otherwise jump.
    """
    own = dict(mc.mhc_parameters(model)) if mc.is_transformed(model) else {}
    phi = [p for name, p in own.items() if name.endswith(".phi")]
    taken = {id(p) for p in own.values()}
    decayed = [p for p in model.parameters() if p.dim() > 1 and id(p) not in taken]
    others = [p for p in model.parameters() if p.dim() <= 1 and id(p) not in taken]
    others += [p for name, p in own.items() if not name.endswith(".phi")]
    optimizer = torch.optim.AdamW(decayed, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer.add_param_group({"params": others, "weight_decay": 0.0})
    if phi:
        optimizer.add_param_group({"params": phi, "weight_decay": 0.0, "lr": rate / 10})
    return optimizer


@torch.no_grad()
def evaluate(model: nn.Module, run: Run, validation: Tensor, args: argparse.Namespace) -> None:
    """Loss on held-out files, and how the connections pass signals on."""
    model.eval()
    losses = []
    for step in range(16):
        ids = batch(validation, args, step)
        losses.append(float(model(input_ids=ids, labels=ids, use_cache=False).loss))
    run.validation_loss = statistics.mean(losses)
    if mc.is_transformed(model):
        report = mc.stability(model, input_ids=batch(validation, args, 0), use_cache=False)
        run.forward_gain, run.backward_gain = report.forward_gain, report.backward_gain
        run.gains = [(s.composite_forward_gain, s.composite_backward_gain) for s in report.sites]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's predictions in evaluation mode."""
    result: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return result


def count(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def save(runs: list[Run], args: argparse.Namespace) -> None:
    """Prints the table; writes it as JSON, and two pictures as PNG and SVG."""
    headers = ["version", "sites", "parameters added", "step-0 difference", "train loss",
               "validation loss", "gradient spikes", "forward gain", "backward gain",
               "tokens/s"]  # fmt: skip
    table = tabulate([run.row() for run in runs], headers=headers, disable_numparse=True,
                     colalign=["left"] + ["right"] * 9)  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items()}
    settings |= {"torch": torch.__version__, "transformers": transformers.__version__}
    results = [{**asdict(run), "spikes": run.spikes} for run in runs]
    text = json.dumps({"settings": settings, "runs": results}, indent=2)
    (args.out / "results.json").write_text(text + "\n")
    written = [args.out / "results.json"]
    written += plot_loss_gap(runs, args.out) + plot_gains(runs, args.out)
    print(f"\n{table}\n")
    print("train loss: mean of the last 10 steps; gains: largest absolute row and column sum of "
          "the product of all H_res (1 for a plain residual)")  # fmt: skip
    print("Losses of versions this small differ by less than seeds do; the gains are the point.")
    print("written: " + ", ".join(str(path) for path in written))


if __name__ == "__main__":
    main()
