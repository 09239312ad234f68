"""A data-flow graph of tensor operations, and the residual adds and streams in it.

The same analysis serves two graphs: the whole model as recorded from one eager run (ATen
operations) and one block as traced with torch.fx (calls of functions and submodules).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mhc_compile._torch_compat import Source

ADDS = frozenset({"add", "add_", "iadd", "__add__", "__iadd__", "__radd__"})
ADDCMULS = frozenset({"addcmul", "addcmul_"})
HEAVY = (
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "linear", "einsum", "convolution",
    "conv1d",
    "conv2d", "conv3d", "scaled_dot_product", "embedding", "grouped_mm", "mv", "addmv", "tensordot",
    "_weight_int", "cumsum", "flex_attention",
)  # fmt: skip
NOOPS = frozenset({
    "view", "reshape", "_unsafe_view", "alias", "detach", "clone", "_to_copy", "to", "float",
    "contiguous", "type_as", "type", "half", "bfloat16", "double", "unflatten", "flatten",
    "squeeze", "unsqueeze", "expand", "lift_fresh", "_reshape_alias",
})  # fmt: skip


def is_heavy_name(name: str) -> bool:
    """Whether an operation mixes channels or tokens: a matmul, a convolution, an attention."""
    return name.lstrip("_").startswith(tuple(h.lstrip("_") for h in HEAVY))


@dataclass
class Op:
    """One operation: `operands` are its tensor arguments in order, None for a parameter.

    `inputs` are all activations it reads, `path` the module calls it ran in, outermost first, each
    as (module name, number of the call).
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
    skip_scaled: tuple[bool, ...] = ()
    detail: object = None


@dataclass(frozen=True)
class Candidate:
    """A residual-like add `index = skip + branch`; `branch` lists the other terms.

    `product` marks addcmul, whose branch is the product of its terms; `absorbed` are the inner
    adds of a flattened sum such as (x + attention) + mlp.
    """

    index: int
    skip: int
    operand: int
    branch: tuple[int, ...]
    product: bool = False
    absorbed: tuple[int, ...] = ()


@dataclass
class Flow:
    """Operations in execution order, so that inputs precede their readers."""

    ops: list[Op] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)

    def finish(self) -> None:
        """Computes ancestors (as bit sets), readers, liveness and immediate dominators."""
        count = len(self.ops)
        self.ancestors: list[int] = [0] * count
        self.readers: list[list[int]] = [[] for _ in range(count)]
        self.dominator: list[int] = [-1] * count
        depth = [0] * count
        for op in self.ops:
            bits = 0
            for i in dict.fromkeys(op.inputs):
                bits |= self.ancestors[i] | (1 << i)
                self.readers[i].append(op.index)
            self.ancestors[op.index] = bits
            dom = self._common_dominator(op.inputs, depth)
            self.dominator[op.index] = dom
            depth[op.index] = depth[dom] + 1 if dom >= 0 else 1
        self.live = 0
        for i in self.outputs:
            self.live |= self.ancestors[i] | (1 << i)

    def _common_dominator(self, inputs: tuple[int, ...], depth: list[int]) -> int:
        dom: int | None = None
        for i in dict.fromkeys(inputs):
            if dom is None:
                dom = i
                continue
            while dom != i:
                if dom == -1 or i == -1:
                    return -1
                if depth[dom] >= depth[i]:
                    dom = self.dominator[dom]
                else:
                    i = self.dominator[i]
        return -1 if dom is None else dom

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

    def between(self, start: int, stop: int) -> list[int]:
        """Operations that depend on `start` and on which `stop` depends, in order."""
        bits = self.ancestors[stop]
        return [i for i in range(start + 1, stop) if bits >> i & 1 and self.reads(i, start)]

    def light_path(self, start: int, stop: int) -> list[int] | None:
        """Operations from `start` to `stop` inclusive of `stop`, or None if one is heavy."""
        path = [*self.between(start, stop), stop]
        return None if any(self.ops[i].heavy for i in path) else path


def find_candidates(
    flow: Flow, allow: Callable[[Op], bool] = lambda op: True
) -> dict[int, Candidate]:
    """Finds adds one of whose terms, the skip, is an ancestor of all the others.

    If no pair of terms fits, inner adds that nothing else reads are flattened first, so that
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
    if op.name in ADDCMULS:
        first, rest = op.operands[0], tuple(i for i in op.operands[1:] if i is not None)
        if first is None or not rest or op.shapes[0] != op.shape:
            return None
        if any(flow.reads(i, flow.canonical(first)) for i in rest):
            return Candidate(op.index, flow.canonical(first), first, rest, product=True)
        return None
    terms = _terms(flow, op)
    if terms is None:
        return None
    inner: list[int] = []
    skip = _pick_skip(flow, terms)
    if skip is None:
        flat: list[int] = []
        for term in terms:
            below = _terms(flow, flow.ops[term]) if len(flow.readers[term]) == 1 else None
            flat += below or [term]
            inner += [term] if below else []
        skip = _pick_skip(flow, flat) if inner else None
        terms = flat
    if skip is None:
        return None
    branch = list(terms)
    branch.remove(skip)
    return Candidate(op.index, flow.canonical(skip), skip, tuple(branch), absorbed=tuple(inner))


def _terms(flow: Flow, op: Op) -> list[int] | None:
    """The two activations of a full-shape floating-point add."""
    if op.name not in ADDS or not op.is_float or len(op.shape) < 2 or len(op.operands) != 2:
        return None
    if any(shape != op.shape for shape in op.shapes):
        return None
    first, second = op.operands
    return None if first is None or second is None else [first, second]


def _pick_skip(flow: Flow, terms: list[int]) -> int | None:
    for skip in terms:
        others = list(terms)
        others.remove(skip)
        if others and all(flow.reads(other, flow.canonical(skip)) for other in others):
            return skip
    return None


def link_streams(
    flow: Flow, candidates: dict[int, Candidate]
) -> tuple[list[list[int]], dict[int, int]]:
    """Joins candidates whose skip comes from another one through light operations alone.

    Returns:
        The chains, each a list of candidate indices in execution order, and for each candidate
        that has one, its predecessor.
    """
    previous: dict[int, int] = {}
    for index, candidate in candidates.items():
        at = candidate.skip
        while at >= 0 and at not in candidates:
            dom = flow.dominator[at]
            if (
                dom < 0
                or flow.ops[at].heavy
                or any(flow.ops[i].heavy for i in flow.between(dom, at))
            ):
                at = -1
                break
            at = dom
        if at >= 0 and flow.ops[at].shape[-1] == flow.ops[index].shape[-1]:
            previous[index] = at
    group = {index: index for index in candidates}
    for index in sorted(candidates):
        if index in previous:
            group[index] = group[previous[index]]
    chains: dict[int, list[int]] = {}
    for index in sorted(candidates):
        chains.setdefault(group[index], []).append(index)
    return list(chains.values()), previous


def branch_region(flow: Flow, candidate: Candidate) -> list[int]:
    """Operations of the sublayer: they depend on the skip and the branch depends on them."""
    bits = 0
    for term in candidate.branch:
        bits |= flow.ancestors[term] | (1 << term)
    return [
        i for i in range(candidate.skip + 1, candidate.index)
        if bits >> i & 1 and flow.reads(i, candidate.skip)
    ]  # fmt: skip


def split_nested(
    flow: Flow, candidates: dict[int, Candidate], chains: Iterable[list[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Separates streams from chains inside (or around) another stream's sublayers.

    The longest chain wins: gates, LoRA, gelu's cubic or a shared expert's sum lie inside a longer
    stream's branch, and one global skip lies around it.

    Returns:
        Accepted chains, ordered by their first add, and dropped ones.
    """
    region: dict[int, int] = {}
    for index, candidate in candidates.items():
        bits = 0
        for i in branch_region(flow, candidate):
            bits |= 1 << i
        region[index] = bits
    accepted: list[list[int]] = []
    dropped: list[list[int]] = []
    for chain in sorted(chains, key=len, reverse=True):
        inside = 0
        adds = 0
        for index in chain:
            inside |= region[index]
            adds |= 1 << index
        for other in accepted:
            if any(inside >> i & 1 for i in other) or any(region[i] & adds for i in other):
                dropped.append(chain)
                break
        else:
            accepted.append(chain)
    return sorted(accepted), dropped
