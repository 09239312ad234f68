"""Whether a sublayer is an MLP or an attention, by its recorded operations."""

from __future__ import annotations

from mhc_compile.passes.flow import NOOPS, PARTIAL, Candidate, Flow, Op, branch_region

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
_PASSING = NOOPS | PARTIAL | {"index", "t", "transpose", "permute"}


def is_mlp(flow: Flow, candidate: Candidate) -> bool:
    """Whether F multiplies activations by weights alone, be they those that a router selects.

    A product of two activations is an attention, whatever makes its scores to weights, and what
    is not known: F is an MLP only where there is none, and no operator that is named so.
    """
    return not any(_attends(flow, flow.ops[i]) for i in branch_region(flow, candidate))


def _attends(flow: Flow, op: Op) -> bool:
    if "attention" in op.name or "attn" in op.name:
        return True
    factors = op.operands[-2:]
    return op.name in _PRODUCTS and not any(_is_weight(flow, i) for i in factors)


def _is_weight(flow: Flow, index: int | None) -> bool:
    """Whether a value is made of parameters and buffers, of which inputs choose at most a part."""
    if index is None:
        return True
    op = flow.ops[index]
    while not op.fixed and op.inputs and op.name in _PASSING:
        op = flow.ops[op.inputs[0]]
    return op.fixed
