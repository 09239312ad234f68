"""A data-flow graph of tensor operations, and the residual adds in it.

The same analysis serves two graphs: the whole model as recorded from one eager run (ATen
operations) and one block as traced with torch.fx (calls of functions and submodules).
`streams` joins the adds found here into residual streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mhc_compile._torch_compat import Source

ADDS = frozenset({"add", "add_", "iadd", "__add__", "__iadd__", "__radd__"})
SUBS = frozenset({"sub", "sub_", "isub", "__sub__", "__isub__", "subtract"})
ADDCMULS = frozenset({"addcmul", "addcmul_"})
DIVISIONS = frozenset({"div", "div_", "truediv", "itruediv", "__truediv__", "divide"})
SCALES = DIVISIONS | {"mul", "mul_", "imul", "__mul__", "__rmul__", "multiply", "neg"}
LERPS = frozenset({"lerp", "lerp_"})
HEAVY = (
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "linear", "einsum", "convolution",
    "conv1d",
    "conv2d", "conv3d", "scaled_dot_product", "embedding", "grouped_mm", "mv", "addmv", "tensordot",
    "_weight_int", "cumsum", "flex_attention",
    # Not heavy, but the result is another sequence, into which a stream is written.
    "masked_scatter", "index_put", "scatter", "index_copy", "index_add",
    # Mixes tokens, as FNet does.
    "fft",
)  # fmt: skip
NOOPS = frozenset({
    "view", "reshape", "_unsafe_view", "alias", "detach", "clone", "_to_copy", "to", "float",
    "contiguous", "type_as", "type", "half", "bfloat16", "double", "unflatten", "flatten",
    "squeeze", "unsqueeze", "expand", "lift_fresh", "_reshape_alias",
})  # fmt: skip
GATED = (
    "its skip is multiplied by a value computed from the stream itself (a gate, as in highway "
    "layers), which has no counterpart in mHC"
)
PARTS = "its skip is cut or joined from parts of earlier states; add the branch to the whole state"
SWAPPED = "the residual is a factor of addcmul; write it as f + scale * x"
_PRODUCT = "the residual is added inside a fused matrix product; write it as x + F(x)"
_SOME_TOKENS = "the residual is added to a part of the tokens only, which has no counterpart in mHC"
REFUSED_ADDS = {
    **dict.fromkeys(
        ("addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addmv", "addr"), _PRODUCT
    ),
    **dict.fromkeys(("scatter_add", "scatter_add_", "index_add", "index_add_"), _SOME_TOKENS),
}
"""Operations that add to their first operand in a way that is refused, with the reason."""
PARTIAL = frozenset({"slice", "select", "narrow", "index_select", "gather", "getitem"})
_STRUCTURE = PARTIAL | {"cat", "concat", "concatenate"}
_WALK = 8  # scales and casts between a state and the add that it enters


def is_heavy_name(name: str) -> bool:
    """Whether an operation mixes channels or tokens: a matmul, a convolution, an attention."""
    return name.lstrip("_").startswith(tuple(h.lstrip("_") for h in HEAVY))


@dataclass
class Op:
    """One operation: `operands` are its tensor arguments in order, None for a parameter.

    `inputs` are all activations it reads, `weights` what identifies the parameters it reads,
    `fixed` that it reads nothing else,
    `path` the module calls it ran in, outermost first, each as (module name, number of the call).
    """

    index: int
    name: str
    inputs: tuple[int, ...]
    operands: tuple[int | None, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    shape: tuple[int, ...] = ()
    is_float: bool = False
    heavy: bool = False
    noop: bool = False
    path: tuple[tuple[str, int], ...] = ()
    source: Source | None = None
    weights: tuple[object, ...] = ()
    fixed: bool = False
    detail: object = None


@dataclass(frozen=True)
class Candidate:
    """A residual-like add `index = scale * skip + branch`.

    Attributes:
        index: the add.
        skip: the state that it continues, behind casts and scales.
        operand: the term of the add that is made of it.
        branch: the other terms.
        way: operations from the skip (not included) to the operand (included), casts and scales.
        product: an addcmul or lerp, whose branch is not just the sum of the other terms.
        absorbed: the inner adds of a flattened sum such as (x + attention) + mlp.
        reason: why it cannot be rewritten, if that shows here already.
    """

    index: int
    skip: int
    operand: int
    branch: tuple[int, ...]
    way: tuple[int, ...] = ()
    product: bool = False
    absorbed: tuple[int, ...] = ()
    reason: str = ""


@dataclass
class Flow:
    """Operations in execution order, so that inputs precede their readers."""

    ops: list[Op] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)

    def finish(self) -> None:
        """Computes ancestors (as bit sets), readers and liveness."""
        count = len(self.ops)
        self.ancestors: list[int] = [0] * count
        self.readers: list[list[int]] = [[] for _ in range(count)]
        self.heavy = 0
        for op in self.ops:
            bits = 0
            for i in dict.fromkeys(op.inputs):
                bits |= self.ancestors[i] | (1 << i)
                self.readers[i].append(op.index)
            self.ancestors[op.index] = bits
            self.heavy |= int(op.heavy) << op.index
        # Descendants by the reversed graph, so that what lies between two operations is one `and`.
        self.descendants: list[int] = [0] * count
        for op in reversed(self.ops):
            for i in dict.fromkeys(op.inputs):
                self.descendants[i] |= self.descendants[op.index] | (1 << op.index)
        self.live = 0
        for i in self.outputs:
            self.live |= self.ancestors[i] | (1 << i)

    def is_live(self, index: int) -> bool:
        """Whether the model's outputs depend on the operation."""
        return bool(self.live >> index & 1)

    def reads(self, index: int, source: int) -> bool:
        """Whether `index` depends on `source` (not on itself)."""
        return bool(self.ancestors[index] >> source & 1)

    def canonical(self, index: int) -> int:
        """The value behind views, casts and copies."""
        while self.ops[index].noop and self.ops[index].inputs:
            index = self.ops[index].inputs[0]
        return index

    def bits_between(self, start: int, stop: int) -> int:
        """Operations that depend on `start` and on which `stop` depends, as a bit set."""
        return self.descendants[start] & self.ancestors[stop]

    def between(self, start: int, stop: int) -> list[int]:
        """The same as a list, in order."""
        return list(bits_of(self.bits_between(start, stop)))

    def is_light(self, start: int, stop: int) -> bool:
        """Whether nothing heavy lies between `start` and `stop`, itself included."""
        return not (self.bits_between(start, stop) | 1 << stop) & self.heavy

    def light_path(self, start: int, stop: int) -> list[int] | None:
        """Operations from `start` to `stop` inclusive of `stop`, or None if one is heavy."""
        return [*self.between(start, stop), stop] if self.is_light(start, stop) else None


def bits_of(bits: int) -> Iterator[int]:
    """The positions of the ones in a bit set, lowest first."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def find_candidates(
    flow: Flow, allow: Callable[[Op], bool] = lambda op: True
) -> dict[int, Candidate]:
    """Finds adds one of whose terms, the skip, is an ancestor of all the others.

    The skip may be scaled by numbers, parameters or values that do not depend on it. If no pair of
    terms fits, inner adds that nothing else reads are flattened first, so that
    `(x + attention) + mlp` is one residual with two branch terms.

    Args:
        flow: a finished graph.
        allow: which adds to look at.

    Returns:
        Candidates by the index of their add, in execution order.
    """
    found: dict[int, Candidate] = {}
    absorbed: set[int] = set()
    for op in reversed(flow.ops):
        if op.index in absorbed or not flow.is_live(op.index) or not allow(op):
            continue
        candidate = _candidate(flow, op)
        if candidate is not None:
            found[op.index] = candidate
            absorbed.update(candidate.absorbed)
    return dict(sorted(found.items()))


def _candidate(flow: Flow, op: Op) -> Candidate | None:
    if op.name in ADDCMULS or op.name in LERPS or op.name in REFUSED_ADDS:
        return _product_candidate(flow, op)
    terms = _terms(flow, op)
    if terms is None:
        return None
    last_resort = None
    inner: tuple[int, ...] = ()
    while True:
        found = _pick_skip(flow, op, terms)
        if found is not None:
            term, way, skip, reason = found
            branch = list(terms)
            branch.remove(term)
            candidate = Candidate(op.index, skip, term, tuple(branch), way, False, inner, reason)
            if reason != PARTS:
                return candidate
            last_resort = last_resort or candidate  # slices inside a sublayer look like these
        flat, opened = _flattened(flow, op, terms)
        if not opened:
            return last_resort
        terms, inner = flat, inner + opened


def _flattened(flow: Flow, op: Op, terms: list[int]) -> tuple[list[int], tuple[int, ...]]:
    """The terms of a sum with inner sums that nothing else reads taken apart, and those sums."""
    flat: list[int] = []
    opened: list[int] = []
    for term in terms:
        below = None
        if op.name in ADDS and len(flow.readers[term]) == 1 and flow.ops[term].name in ADDS:
            below = _terms(flow, flow.ops[term])
        flat += below or [term]
        opened += [term] if below else []
    return flat, tuple(opened)


def _product_candidate(flow: Flow, op: Op) -> Candidate | None:
    """Adds with more in them: addcmul, lerp, and operations that accumulate onto the skip."""
    if not op.operands or not op.is_float or len(op.shape) < 2 or op.shapes[0] != op.shape:
        return None
    first, rest = op.operands[0], tuple(i for i in op.operands[1:] if i is not None)
    if first is None or not rest:
        return None
    for way, skip, reason in _origins(flow, first):
        if any(flow.reads(i, skip) for i in rest):
            if op.name in LERPS and any(flow.reads(i, skip) for i in rest[1:]):
                reason = GATED
            why = REFUSED_ADDS.get(op.name, reason)
            return Candidate(op.index, skip, first, rest, way, product=True, reason=why)
    for number, operand in enumerate(op.operands[1:], 1):  # f + scale * x
        if operand is None or op.shapes[number] != op.shape or op.name not in ADDCMULS:
            continue
        for way, skip, reason in _origins(flow, operand):
            if flow.reads(first, skip):
                return Candidate(
                    op.index, skip, operand, (first,), way, True, reason=reason or SWAPPED
                )
    return None


def _terms(flow: Flow, op: Op) -> list[int] | None:
    """The two activations of a full-shape floating-point add or difference."""
    if op.name not in ADDS and op.name not in SUBS:
        return None
    if not op.is_float or len(op.shape) < 2 or len(op.operands) != 2:
        return None
    if any(shape != op.shape for shape in op.shapes):
        return None
    first, second = op.operands
    return None if first is None or second is None else [first, second]


def _pick_skip(
    flow: Flow, op: Op, terms: list[int]
) -> tuple[int, tuple[int, ...], int, str] | None:
    """The term that is a state of which all other terms are made: plain, scaled, or gated."""
    found = []
    for number, term in enumerate(terms):
        if number and op.name in SUBS:
            break
        others = [*terms[:number], *terms[number + 1 :]]
        for way, skip, reason in _origins(flow, term):
            if all(flow.reads(other, skip) for other in others) and not any(
                origin == skip and not gate
                for other in others for _, origin, gate in _origins(flow, other)
            ):  # fmt: skip
                scales = sum(not flow.ops[i].noop for i in way)
                found.append((bool(reason), scales, number, (term, way, skip, reason)))
    return min(found)[-1] if found else None


def _origins(flow: Flow, term: int) -> Iterator[tuple[tuple[int, ...], int, str]]:
    """States that a term may be made of by casts, views and scales, nearest first.

    Yields:
        The operations on the way, the state, and "" or why it cannot be rewritten.
    """
    todo: list[tuple[tuple[int, ...], int, str]] = [((), term, "")]
    while todo:
        way, at, reason = todo.pop(0)
        while flow.ops[at].noop and flow.ops[at].inputs:
            way, at = (at, *way), flow.ops[at].inputs[0]
        yield way, at, reason
        op = flow.ops[at]
        if op.name in _STRUCTURE and len(way) < _WALK:
            todo += [((at, *way), i, reason or PARTS) for i in op.inputs]
        if op.name not in SCALES or len(way) >= _WALK:
            continue
        for number, operand in enumerate(op.operands):
            if operand is None or op.shapes[number] != op.shape:
                continue
            if number and op.name in DIVISIONS:
                break
            state = flow.canonical(operand)
            factors = [i for i in (*op.operands[:number], *op.operands[number + 1 :])
                       if i is not None]  # fmt: skip
            gated = any(
                i == state or flow.reads(i, state)
                or flow.reads(state, i) and flow.ops[i].shape == op.shape
                for i in factors
            )  # fmt: skip
            todo.append(((at, *way), operand, GATED if gated else reason))


def branch_bits(flow: Flow, candidate: Candidate) -> int:
    """Operations of the sublayer, as a bit set.

    They depend on the skip, and the branch depends on them.
    """
    bits = 0
    for term in candidate.branch:
        bits |= flow.ancestors[term] | (1 << term)
    return bits & flow.descendants[candidate.skip]


def branch_region(flow: Flow, candidate: Candidate) -> list[int]:
    """Operations of the sublayer, in order; see `branch_bits`."""
    return list(bits_of(branch_bits(flow, candidate)))
