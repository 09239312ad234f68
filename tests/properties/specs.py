"""Specs of random transformers: what can be drawn, what excludes what, and how to shrink it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

from hypothesis import strategies as st


class Plain:
    """A frozen dataclass whose repr shows what differs from the defaults; it can be evaluated."""

    def __repr__(self):
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Site(Plain):
    """One sublayer and its residual add."""

    body: str = "mlp"
    norm: str = "pre"
    norm_kind: str = "layer"
    scale: str = "none"
    write: str = "x+f"
    place: str = "block"
    closed: bool = False  # the norm is called inside the sublayer's module
    drop: str = "none"
    cast: str = "none"


@dataclass(frozen=True, repr=False)
class Stack(Plain):
    """Blocks that run one after the other on one residual stream."""

    blocks: tuple[tuple[Site, ...], ...] = ((Site(),),)
    trunk: str = "loop"
    carry: str = "tensor"
    layout: str = "btc"
    inner: str = "btc"  # layout within a block, if the stack's is btc
    inject: str = "none"
    repeat: bool = False
    tied: str = "none"
    hook: str = "none"
    checkpoint: str = "none"
    aux: str = "none"
    pad: bool = False  # tokens are weighted between the blocks
    states: str = "none"  # the model returns the state behind each block, or their sum


@dataclass(frozen=True, repr=False)
class Spec(Plain):
    """A whole model: its stacks and what surrounds them."""

    stacks: tuple[Stack, ...] = (Stack(),)
    topology: str = "single"
    in_root: bool = False  # stacks are no modules: their loop runs in the root's forward
    stem: str = "embed"
    head: str = "norm"
    width: int = 6
    batch: int = 2
    length: int = 5
    n: int = 2
    double: bool = False
    seed: int = 0


# --- drawing --------------------------------------------------------------------------------------

NORMS = ("pre", "post", "sandwich", "none", "branch", "before")
NORM_KINDS = ("layer", "own", "rms")
# Names that are rare stand behind the plus: the library may or must refuse them.
SCALES = ("none", "constant", "layer", "alpha", "addcmul", "minus", "skip", "skip_scalar",
          "skip_vector", "alpha_skip", "adaptive", "gated") * 4 + (
          "addcmul_skip", "highway")  # fmt: skip
WRITES = ("x+f", "f+x", "torch", "method", "iadd", "add_", "f_add_")
IN_PLACE = ("iadd", "add_", "f_add_")
BODIES = ("mlp", "cubic", "swiglu", "gated_cubic", "attention", "rotary", "relative", "conv", "ssm",
          "lora", "experts", "chained_experts", "inner", "parallel")  # fmt: skip
CARRIES = ("tensor", "keyword", "pair", "ahead", "tuple", "behind", "list", "dict", "named", "data")
STATES = CARRIES[4:]  # one argument holds everything
LIGHT_ON_DTYPE = ("mlp", "cubic", "swiglu", "gated_cubic", "lora", "conv")


@st.composite
def sites(draw, norm, norm_kind, place, body=None):
    return Site(
        body=body or draw(st.sampled_from(BODIES)),
        norm=norm, norm_kind=norm_kind, place=place,
        scale=draw(st.sampled_from(SCALES)) if draw(st.booleans()) else "none",
        write=draw(st.sampled_from(WRITES)),
        closed=draw(st.booleans()),
        drop=draw(st.sampled_from(("none", "dropout", "path"))),
        cast=draw(st.sampled_from(("none", "none", "none", "add64", "branch64", "branch16"))),
    )  # fmt: skip


@st.composite
def stacks(draw, cross=False, largest=3):
    norm, kind = draw(st.sampled_from(NORMS)), draw(st.sampled_from(NORM_KINDS))
    place = draw(st.sampled_from(("block", "inside", "output", "add_norm")))
    mixed = draw(st.integers(0, 4)) == 4  # norms and places differ from site to site
    pattern = draw(st.integers(1, largest))

    def site(body=None):
        if not mixed:
            return draw(sites(norm, kind, place, body))
        return draw(
            sites(
                draw(st.sampled_from(NORMS)), draw(st.sampled_from(NORM_KINDS)),
                draw(st.sampled_from(("block", "inside", "output", "add_norm"))), body,
            )
        )  # fmt: skip

    same = draw(st.booleans())  # all blocks alike
    depth = draw(st.integers(1, 3))
    first = tuple(site("cross" if cross and k == 0 else None) for k in range(pattern))
    blocks = tuple(
        first if same or k == 0
        else tuple(site("cross" if cross and j == 0 else None) for j in range(pattern))
        for k in range(depth)
    )  # fmt: skip
    return Stack(
        blocks=blocks,
        trunk=draw(st.sampled_from(("loop", "loop", "sequential", "root", "deferred"))),
        carry=draw(st.sampled_from(CARRIES)),
        layout=draw(st.sampled_from(("btc",) * 12 + ("flat", "tbc") * 2 + ("bct",))),
        inner=draw(st.sampled_from(("btc",) * 12 + ("flat", "tbc") * 2 + ("bct",))),
        inject=draw(
            st.sampled_from(
                ("none",) * 6
                + ("constant", "learned", "plain", "long", "inside", "feature", "unet")
            )
        ),
        repeat=draw(st.integers(0, 5)) == 5,
        tied=draw(st.sampled_from(("none", "none", "none", "modules", "parameters"))),
        hook=draw(st.sampled_from(("none",) * 4 + ("after", "before", "halve"))),
        pad=draw(st.integers(0, 5)) == 5,
        states=draw(st.sampled_from(("none",) * 8 + ("out", "sum"))),
        checkpoint=draw(st.sampled_from(("none", "none", "none", "plain", "reentrant"))),
        aux=draw(st.sampled_from(("none", "branch", "peek"))),
    )


@st.composite
def specs(draw):
    """Valid specs; the first choices of each axis are the plainest."""
    topology = draw(
        st.sampled_from(
            ("single",) * 4 + ("encdec", "towers", "interleaved", "stages", "fork", "joint")
        )
    )
    count = 1 if topology == "single" else 2
    if topology in ("towers", "stages"):
        count = draw(st.integers(2, 3))
    if topology == "fork":
        count = 3
    crosses = [topology == "encdec" and k == 1 for k in range(count)]
    largest = 3 if count == 1 else 2
    spec = Spec(
        stacks=tuple(draw(stacks(cross, largest)) for cross in crosses),
        topology=topology,
        in_root=draw(st.booleans()),
        stem=draw(st.sampled_from(("embed", "states", "positions", "normed", "sum"))),
        head=draw(st.sampled_from(("norm", "none", "linear", "logits", "pool", "cubic"))),
        width=draw(st.sampled_from((6, 5, 7, 8, 12))),
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(2, 6)),
        n=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 999)),
        double=draw(st.integers(0, 5)) == 5,
    )  # fmt: skip
    return valid(spec)


def valid(spec):
    """Takes back choices that exclude each other."""
    return replace(spec, stacks=tuple(_valid_stack(s, spec, k) for k, s in enumerate(spec.stacks)))


def _valid_stack(stack, spec, k):
    if spec.topology in ("interleaved", "joint"):
        other = spec.stacks[0]
        stack = replace(
            stack, trunk="loop", carry="tensor", layout="btc", inject="none", repeat=False,
            checkpoint="none", aux="none", pad=False, states="none",
            blocks=(stack.blocks * 3)[: len(other.blocks)],
        )  # fmt: skip
    if spec.topology == "joint" and stack.inner == "bct":  # the joint attention is not
        stack = replace(stack, inner="tbc")
    if stack.trunk in ("sequential", "deferred") or stack.layout != "btc":
        stack = replace(stack, pad=False, states="none")
    if stack.trunk == "root":
        stack = replace(stack, inner="btc", carry="tensor", hook="none", checkpoint="none")
    if stack.hook == "halve" and stack.carry not in ("tensor", "keyword"):
        stack = replace(stack, hook="after")
    if stack.inject == "feature" and (spec.stem == "states" or stack.layout != "btc"):
        stack = replace(stack, inject="constant")
    if stack.states == "sum" and stack.inject in ("long", "unet"):
        stack = replace(stack, inject="none")
    if stack.inject == "inside" and (stack.trunk == "root" or stack.carry != "tensor"):
        stack = replace(stack, inject="constant")
    cross = spec.topology == "encdec" and k == 1
    if cross and stack.trunk == "sequential" and stack.carry not in STATES:
        stack = replace(stack, trunk="loop")  # no way to hand the encoder's result on
    if stack.trunk == "sequential":
        stack = replace(stack, inject="none", repeat=False, checkpoint="none")
        if stack.carry not in STATES:
            stack = replace(stack, carry="tensor", inner="btc", layout="btc")
    if stack.trunk == "deferred":
        stack = replace(stack, carry="tensor", inner="btc", inject="none", checkpoint="none",
                        hook="none")  # fmt: skip
    if stack.layout != "btc":
        stack = replace(stack, inner="btc")
    if stack.carry in STATES or stack.carry not in ("pair", "ahead"):
        stack = replace(stack, aux="none")
    if stack.checkpoint == "reentrant" and (
        stack.carry in ("keyword", *STATES) or spec.topology == "encdec"
    ):
        stack = replace(stack, checkpoint="plain")
    if stack.tied == "modules" and stack.inject != "none":
        stack = replace(stack, tied="parameters")
    if cross and "cross" not in [site.body for block in stack.blocks for site in block]:
        (site, *sites), *blocks = stack.blocks  # else nothing reads the encoder
        stack = replace(stack, blocks=((replace(site, body="cross"), *sites), *blocks))
    total = sum(len(sites) for sites in stack.blocks)
    # The model's own input, and a state that is read later, must not be overwritten.
    # A checkpointed block would be recomputed from what it wrote.
    read_later = stack.inject != "none" or stack.states != "none" or stack.checkpoint != "none"
    shared = spec.topology in ("towers", "interleaved", "joint", "fork")
    keep = read_later or shared or spec.stem == "states" or stack.layout != "btc"
    keep |= stack.aux == "branch" or "adaptive" in [s.scale for b in stack.blocks for s in b]
    blocks = tuple(
        tuple(_valid_site(site, stack, spec, total, keep) for site in block)
        for block in stack.blocks
    )
    return replace(stack, blocks=blocks)


def _valid_site(site, stack, spec, total, keep):
    changes = {}
    bare = stack.trunk == "sequential" and stack.carry == "tensor"  # nothing but the stream
    plain = (stack.layout, stack.inner) == ("btc", "btc")
    if spec.double:
        site = replace(site, cast="none")
    labelled = spec.stem != "states" and spec.topology != "stages"
    if site.scale == "adaptive" and (bare or not plain or not labelled):
        site = replace(site, scale="layer")
    if site.scale == "gated" and (not plain or site.place == "inside" or site.body == "parallel"):
        site = replace(site, scale="layer")
    if site.scale == "highway":
        site = replace(site, write="x+f", scale="highway" if plain else "skip")
    layout = stack.layout if stack.layout != "btc" else stack.inner
    if stack.trunk == "deferred":
        changes.update(place="block", closed=False, cast="none", write="f+x")
        if site.norm in ("post", "before"):
            changes["norm"] = "pre"
        if site.scale not in ("none", "constant", "layer", "adaptive"):
            changes["scale"] = "none"
        if site.body == "parallel":
            changes["body"] = "attention"
    if bare and site.body in ("cross", "rotary"):
        changes["body"] = "relative"  # the others read more than the stream
    if site.body == "inner" and total < 2:
        changes["body"] = "mlp"
    if keep and site.write in IN_PLACE:
        changes["write"] = "x+f"
    body = changes.get("body", site.body)
    if body == "parallel":
        if site.place == "output":
            changes["place"] = "block"
        changes["cast"] = "none"
        if site.scale not in ("none", "constant", "layer", "adaptive"):
            changes["scale"] = "none"
        if site.write in ("add_", "f_add_"):
            changes["write"] = "x+f"
    if site.place == "output" and layout == "bct":
        changes["place"] = "block"
    if changes.get("cast", site.cast) in ("branch64", "branch16") and body not in LIGHT_ON_DTYPE:
        changes["cast"] = "none"
    if changes.get("cast", site.cast) == "add64":
        changes.update(scale="constant", write="x+f")
    return replace(site, **changes)


def all_sites(spec):
    return [site for stack in spec.stacks for block in stack.blocks for site in block]


def shorter(spec):
    """Specs that are a little plainer than this one, for shrinking."""
    for k, stack in enumerate(spec.stacks):
        for plainer in _shorter_stack(stack, spec.topology not in ("interleaved", "joint")):
            yield valid(replace(spec, stacks=_put(spec.stacks, k, plainer)))
    if len(spec.stacks) > 1:
        for stack in spec.stacks:
            yield valid(replace(spec, stacks=(stack,), topology="single"))
    yield from (valid(s) for s in _plainer(spec, skip=("stacks", "topology")))


def _shorter_stack(stack, fewer_blocks):
    blocks = stack.blocks
    if fewer_blocks and len(blocks) > 1:
        yield from (replace(stack, blocks=_put(blocks, j)) for j in range(len(blocks)))
    for j, block in enumerate(blocks):
        if len(block) > 1:
            for i in range(len(block)):
                yield replace(stack, blocks=_put(blocks, j, _put(block, i)))
        for i, site in enumerate(block):
            for plainer in _plainer(site):
                yield replace(stack, blocks=_put(blocks, j, _put(block, i, plainer)))
    yield from _plainer(stack, skip=("blocks",))


def _put(items, k, *new):
    return (*items[:k], *new, *items[k + 1 :])


def shrink(spec, fails):
    """A plainer spec that still fails, found greedily."""
    changed = True
    while changed:
        changed = False
        for candidate in shorter(spec):
            if candidate != spec and fails(candidate):
                spec, changed = candidate, True
                break
    return spec


def _plainer(value, skip=()):
    for field in dataclasses.fields(value):
        if field.name not in skip and getattr(value, field.name) != field.default:
            yield replace(value, **{field.name: field.default})
