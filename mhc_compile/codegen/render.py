"""Turns a `KernelSpec` into the text of a Triton kernel."""

from __future__ import annotations

import functools
import re

import jinja2

from mhc_compile.codegen.sinkhorn_plan import sinkhorn_plan
from mhc_compile.codegen.spec import DTYPES, KernelSpec


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("mhc_compile.codegen"), trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip


def _entries(streams: int, name: str, transposed: bool = False) -> list[str]:
    """The names of a matrix's entries, row by row (of its transpose: column by column)."""
    pairs = [(a, b) for a in range(streams) for b in range(streams)]
    return [f"{name}{b}{a}" if transposed else f"{name}{a}{b}" for a, b in pairs]


def _padded(names: list[str]) -> list[str]:
    """Names filled up with "zero" to a power of two."""
    return names + ["zero"] * ((1 << (len(names) - 1).bit_length()) - len(names))


def render(spec: KernelSpec) -> str:
    """The source of a module with one kernel, `kernel`; the same text for the same spec."""
    template = _environment().get_template(f"{spec.op}.py.jinja")
    text = template.render(
        spec=spec, n=spec.streams, C=spec.channels, K=spec.maps, KP=spec.columns,
        BT=spec.tile.tokens, BC=spec.tile.width, PARTS=spec.tile.parts, SPAN=spec.span,
        STAGES=spec.tile.stages, ragged=spec.ragged, dtype=DTYPES[spec.dtype],
        streams=range(spec.streams), rule=spec.rule, plan=sinkhorn_plan(spec),
        entries=functools.partial(_entries, spec.streams), padded=_padded,
    )  # fmt: skip
    return re.sub(r"\n(?:[ ]*\n)+(?=    )", "\n", text).rstrip() + "\n"  # macros leave empty lines
