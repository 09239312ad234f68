"""The command line: `mhc-compile`, also `python -m mhc_compile`."""

from __future__ import annotations

import argparse
import json
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.render import render
from mhc_compile.codegen.spec import DTYPES
from mhc_compile.conventions import CONVENTIONS
from mhc_compile.errors import ConfigError, MHCError
from mhc_compile.pipeline.measure_op_costs import measure_op_costs
from mhc_compile.scheduler.layout import VARIANTS
from mhc_compile.scheduler.objectives import OBJECTIVES
from mhc_compile.scheduler.op_costs import OpCosts, model_op_costs
from mhc_compile.scheduler.plan_pipeline import plan_pipeline
from mhc_compile.scheduler.solve_recompute import solve_recompute
from mhc_compile.scheduler.write_plan import write_plan


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2; the usage is what --help prints."""
        self.exit(2, f"{self.prog}: {message}\n")


def _emit(arguments: argparse.Namespace) -> tuple[str, Any]:
    """Writes all kernels of one size; returns what to print, as text and for JSON."""
    specs = kernel_set(
        arguments.streams, arguments.hidden, arguments.dtype, tokens=arguments.tokens,
        rule=CONVENTIONS[arguments.convention], target=arguments.target,
    )  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = []
    for spec in specs:
        path = arguments.out / f"{spec.name}.py"
        path.write_text(render(spec))
        written.append({"file": str(path), "key": spec.key, **asdict(spec)})
    return "\n".join(entry["file"] for entry in written), {"kernels": written}


def _recompute(arguments: argparse.Namespace) -> tuple[str, Any]:
    """Solves for the blocks of sublayers to recompute together."""
    plan = solve_recompute(
        arguments.layers, arguments.streams, hidden=arguments.hidden, stages=arguments.stages,
        in_flight=arguments.in_flight, objective=arguments.objective,
        transient=arguments.transient, kept=arguments.kept, head=arguments.head,
        embedding=arguments.embedding, gradients=arguments.gradients,
        flowing=arguments.flowing, memory_budget=arguments.budget,
    )  # fmt: skip
    return str(plan), plan.to_dict()


def _number(text: str) -> int | float:
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"invalid number: {text!r}")


def _numbers(text: str) -> int | float | list[int | float]:
    """One number, or a list of them between commas."""
    return [_number(part) for part in text.split(",")] if "," in text else _number(text)


def _add_recompute(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_recompute)
    parser.add_argument("--layers", type=int, required=True, metavar="L", help="sublayers")
    parser.add_argument("--streams", type=int, required=True, metavar="N")
    parser.add_argument("--stages", type=int, default=1, metavar="P", help="of the pipeline")
    parser.add_argument(
        "--in-flight", type=_numbers, default=1, metavar="M[,M...]",
        help="microbatches in flight, of all stages or one number per stage",
    )  # fmt: skip
    parser.add_argument("--objective", choices=OBJECTIVES, default="paper")
    parser.add_argument(
        "--budget", type=_number, metavar="SIZE", help="memory of a stage, for objective budget"
    )
    parser.add_argument(
        "--hidden", type=_number, default=1, metavar="SIZE",
        help="of one stream; the unit of what is printed (default: 1)",
    )  # fmt: skip
    one, several = (_number, "SIZE"), (_numbers, "SIZE[,SIZE...]")
    for name, (parse, metavar), default, help in (
        ("transient", several, None, "recomputed of a sublayer, times hidden (default: n + 2)"),
        ("kept", several, None, "that F keeps of a sublayer, times hidden (default: 1)"),
        ("gradients", several, 0, "that those of a sublayer's weights add, times hidden "
         "(default: 0)"),
        ("head", one, 0, "held when the backward starts, times hidden (default: 0)"),
        ("flowing", one, 0, "held besides while a block is in work, times hidden (default: 0)"),
        ("embedding", one, None, "kept in place of x_0, times hidden"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=parse, default=default, metavar=metavar, help=help)


def _plan(arguments: argparse.Namespace) -> tuple[str, Any]:
    """Plans a pipeline and writes its views; returns what to print."""
    plan = plan_pipeline(
        arguments.ranks, arguments.microbatches, variant=arguments.variant,
        streams=arguments.streams, costs=_plan_costs(arguments),
    )  # fmt: skip
    text, data = str(plan), {} if not arguments.json else json.loads(plan.to_json())
    if arguments.out:
        files, left_out = write_plan(plan, arguments.out)
        notes = [f"{name} not written: {reason}" for name, reason in left_out.items()]
        text += "\n\n" + "\n".join([*map(str, files), *notes])
        data |= {"files": [str(file) for file in files], "left_out": left_out}
    return text, data


def _plan_costs(arguments: argparse.Namespace) -> dict[str, Any] | OpCosts | None:
    """Costs of actions (--costs), of ops from a file (--op-costs), or modelled from sizes."""
    sizes = arguments.hidden is not None or arguments.tokens is not None
    if sum((arguments.costs is not None, arguments.op_costs is not None, sizes)) > 1:
        raise ConfigError("give one of --costs, --op-costs, and --hidden with --tokens")
    if not arguments.measure and (arguments.attention or arguments.mlp):
        raise ConfigError("--attention and --mlp are what --measure times")
    if arguments.measure and not sizes:
        raise ConfigError("--measure needs the sizes --hidden and --tokens")
    if sizes:
        if arguments.hidden is None or arguments.tokens is None:
            raise ConfigError("modelled costs need both --hidden and --tokens")
        if arguments.measure:
            return measure_op_costs(
                hidden=arguments.hidden, tokens=arguments.tokens, streams=arguments.streams,
                layers=arguments.layers, link_us=arguments.link_us, link_gbs=arguments.link_gbs,
                contention=arguments.contention,
                device=arguments.device, dtype=getattr(torch, arguments.dtype),
                attention=_sublayer(arguments.attention), mlp=_sublayer(arguments.mlp),
            )  # fmt: skip
        return model_op_costs(
            hidden=arguments.hidden, tokens=arguments.tokens, streams=arguments.streams,
            layers=arguments.layers, link_gbs=arguments.link_gbs, contention=arguments.contention,
        )  # fmt: skip
    if arguments.op_costs is not None:
        try:
            return OpCosts.from_dict(json.loads(arguments.op_costs.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{arguments.op_costs}: {error}") from None
    return None if arguments.costs is None else _costs(arguments.costs)


def _sublayer(name: str | None) -> nn.Module | None:
    """Imports package.module:name, a module or what makes one; the working directory counts."""
    if name is None:
        return None
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = pkgutil.resolve_name(name)
        made = found if isinstance(found, nn.Module) else found()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--attention and --mlp take package.module:name, a module or what makes one without "
            f"arguments, got {name}: {error}"
        ) from None
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name} makes a {type(made).__name__}, no torch.nn.Module")
    return made


def _costs(text: str) -> dict[str, Any]:
    """Reads F=1,B=2,W=1,FB=3."""
    costs = {}
    for entry in text.split(","):
        name, _, value = entry.partition("=")
        try:
            costs[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"costs must look like F=1,B=2,W=1,FB=3, got {entry!r}") from None
    return costs


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("mhc-compile", description="Manifold-Constrained Hyper-Connections.")
    commands = parser.add_subparsers(metavar="command", required=True)
    emit = commands.add_parser("emit", help="write the generated Triton kernels, for reading")
    emit.set_defaults(run=_emit)
    emit.add_argument("--out", type=Path, required=True, help="directory for the files")
    emit.add_argument("--streams", type=int, required=True, metavar="N")
    emit.add_argument("--hidden", type=int, required=True, metavar="C", help="channels")
    emit.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the streams")
    emit.add_argument("--tokens", type=int, default=8192, help="of a call; tiles depend on it")
    emit.add_argument("--convention", choices=CONVENTIONS, default="paper")
    emit.add_argument("--target", choices=("cuda", "hip", "interpret"), default="cuda")
    recompute = commands.add_parser("recompute", help="choose the blocks to recompute together")
    _add_recompute(recompute)
    plan = commands.add_parser("plan", help="plan a pipeline: what each rank runs, and when")
    plan.set_defaults(run=_plan)
    plan.add_argument("--ranks", type=int, required=True, metavar="P")
    plan.add_argument("--microbatches", type=int, required=True, metavar="M")
    plan.add_argument("--variant", default=VARIANTS[0], help=", ".join(VARIANTS))
    plan.add_argument("--streams", type=int, default=4, metavar="N")
    plan.add_argument("--costs", help="of actions, e.g. F=1,B=2,I=1,W=1,FB=3")
    plan.add_argument("--op-costs", type=Path, metavar="FILE", help="of ops: JSON, us, OpCosts")
    plan.add_argument("--hidden", type=int, metavar="C", help="model the ops' costs: channels")
    plan.add_argument("--tokens", type=int, help="and tokens of a microbatch")
    plan.add_argument("--layers", type=int, default=1, help="and layers of a stage")
    plan.add_argument(
        "--measure", action="store_true",
        help="time a dense layer of these sizes here instead; messages are modelled",
    )  # fmt: skip
    for name in ("attention", "mlp"):
        plan.add_argument(
            f"--{name}", metavar="PACKAGE.MODULE:NAME",
            help="what --measure times as it: a module or its maker, [1, tokens, C] to the same",
        )  # fmt: skip
    plan.add_argument("--device", help="on which --measure runs (default: the GPU if there is one)")
    plan.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    plan.add_argument(
        "--link-us", type=float, default=0.0, metavar="ALPHA",
        help="of a message besides its bytes, with --measure",
    )  # fmt: skip
    plan.add_argument(
        "--link-gbs", type=float, default=40.0, metavar="BETA", help="GB/s between ranks"
    )
    plan.add_argument(
        "--contention", type=float, default=0.0, metavar="C",
        help="compute takes 1 + C times as long while messages run",
    )  # fmt: skip
    plan.add_argument("--out", type=Path, help="directory for JSON, CSV, trace and pictures")
    for command in (emit, recompute, plan):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if it succeeded, 2 with one line on stderr for a user's mistake."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        text, data = arguments.run(arguments)
    except (MHCError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(data, indent=1) if arguments.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
