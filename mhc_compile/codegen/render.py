"""Turns a `KernelSpec` into the text of a Triton kernel."""

from __future__ import annotations

import functools
import re

import jinja2

from mhc_compile.codegen.shares import shares_of
from mhc_compile.codegen.sinkhorn_plan import sinkhorn_plan
from mhc_compile.codegen.spec import DTYPES, KernelSpec
from mhc_compile.codegen.tiles import fits_whole


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("mhc_compile.codegen"), trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip


def render(spec: KernelSpec) -> str:
    """The source of a module with one kernel, `spec.function`; equal specs have equal texts."""
    plan = sinkhorn_plan(spec)
    flat = "_flat" if spec.tile.flat else ""
    template = _environment().get_template(f"{spec.op}{flat}.py.jinja")
    levels = (spec.streams * (spec.streams + 1) - 1).bit_length()
    text = template.render(
        spec=spec, n=spec.streams, C=spec.channels, K=spec.maps, KP=spec.columns,
        BT=spec.tile.tokens, BC=spec.tile.width, PARTS=spec.tile.parts, SPAN=spec.span,
        STAGES=spec.tile.stages, BK=min(spec.tile.inner, spec.tile.width),
        ragged=spec.ragged, dtype=DTYPES[spec.dtype], WIDE=min(2048, spec.row),
        # AMD's matrix units multiply float32 as it is.
        precision="ieee" if spec.target == "hip" and spec.products == "tf32x3" else spec.products,
        streams=range(spec.streams), rule=spec.rule, plan=plan,
        log_axes=(("row",) if plan.softmax else ()) + plan.log_steps,
        LEVELS=levels, DOTS=1 << levels, PIECES=spec.pieces,
        FUNCTION=spec.function, shares=shares_of(spec), whole=fits_whole(spec),
        XC=0 if spec.equal else spec.channels,
        XN=spec.channels if spec.equal else spec.streams * spec.channels,
        NP=1 << (spec.streams - 1).bit_length(),
    )  # fmt: skip
    return re.sub(r"\n(?:[ ]*\n)+(?=    )", "\n", text).rstrip() + "\n"  # macros leave empty lines
