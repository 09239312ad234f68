"""What mHC makes of a `Spec`, written down on n streams with nothing but `mc.reference`.

It calls the sublayers of the untouched model and does all that lies between them itself. Streams
are [B, T, n, C] throughout: layouts, containers and the places of the adds are the model's
affair. With one stream and no parameters it is the plain model, which checks the generator.
"""

from typing import NamedTuple

import torch
from generator import from_layout, to_layout

import mhc_compile as mc


def true_sites(spec):
    """For each stream, in the order of their first adds: `(stack, block, step)` of its sites."""
    found = []
    for k, stack in enumerate(spec.stacks):
        order = [*range(len(stack.blocks))] * (2 if stack.repeat else 1)
        found.append([(k, b, j) for b in order for j in range(len(stack.blocks[b]))])
    return found


def open_readings(spec):
    """For each stack the readings that are both right, as arguments of `Reading`."""
    options = []
    for stack in spec.stacks:
        norms = [site.norm for sites in stack.blocks for site in sites]
        norms *= 2 if stack.repeat else 1
        mixed = len({norm == "post" for norm in norms}) > 1
        # Nothing tells a post-norm behind a single site from a model's final norm.
        undecided = norms[-1] == "post" and (mixed or len(norms) == 1)
        options.append([
            Reading(norm_last, long_first)
            for norm_last in ((True, False) if undecided else (True,))
            for long_first in ((False, True) if stack.inject == "long" else (False,))
        ])  # fmt: skip
    return options


class Reading(NamedTuple):
    """`norm_last`: a trailing post-norm is applied to each stream, then they are collapsed.

    `long_first`: the streams are collapsed, then a skip around all of them is added.
    """

    norm_last: bool = True
    long_first: bool = False


class Reference:
    """Runs the model of a spec on n streams.

    Args:
        model: the original.
        connections: for each stream, `(phi, alpha, bias)` of its sites in order; None is the
            plain model.
        weights: for each stream, its learned collapse.
        readings: for each stack.
    """

    def __init__(self, model, connections=None, weights=None, readings=None):
        self.model, self.spec = model, model.spec
        self.connections, self.weights = connections, weights
        self.readings = readings or [Reading()] * len(self.spec.stacks)

    def expand(self, x, k):
        n = 1 if self.connections is None else self.spec.n
        return x.unsqueeze(-2).expand(*x.shape[:-1], n, x.shape[-1])

    def collapse(self, x, k):
        if x.shape[-2] == 1:
            return x.squeeze(-2)
        return torch.einsum("n,btnc->btc", self.weights[k].to(x.dtype), x)

    def connect(self, x, k, number, branch, keep, sign):
        """One site: x' = H_res (keep x) + sign H_post F(H_pre x)."""
        if self.connections is None or self.spec.n == 1:
            return keep * x + sign * branch(x.squeeze(-2)).unsqueeze(-2)
        pre, post, res = mc.reference.coefficients(x, *self.connections[k][number], n=self.spec.n)
        f = branch(mc.reference.apply_pre(x, pre))
        return mc.reference.apply_post_res(keep * x, sign * f, post, res)

    # --- one sublayer -----------------------------------------------------------------------

    def branch_of(self, step, layout, ctx, seen):
        """F of a step on [B, T, C]: pre-norm, core, the scales of the add, BERT's dense."""

        def branch(h):
            f = step.core(step.norm_in(to_layout(h, layout)), ctx)
            seen[:] = [f]
            if isinstance(f, tuple):
                f = f[0] + f[1]
            if step.site.place == "output":
                f = step.output.dense(f)
            if step.site.scale == "alpha":
                f = 0.5 * f
            if step.site.scale == "addcmul":
                f = 0.5 * f * step.gamma
            return from_layout(f, layout, ctx["like"])

        return branch

    def step(self, x, k, number, step, layout, ctx, seen):
        scale = step.site.scale
        keep = 1.0
        if scale in ("skip", "alpha_skip"):
            keep = 0.9
        elif scale in ("skip_scalar", "skip_vector", "addcmul_skip"):
            keep = step.keep.squeeze(-1) if step.keep.dim() == 2 else step.keep
        branch = self.branch_of(step, layout, ctx, seen)
        return self.connect(x, k, number, branch, keep, -1.0 if scale == "minus" else 1.0)

    def norm(self, x, step, layout):
        """The norm on each stream by itself."""
        norm = step.norm_out.norm if layout == "bct" and step.site.norm == "post" else step.norm_out
        return norm(x)

    # --- stacks -----------------------------------------------------------------------------

    def stack(self, k, x, ctx):
        """The stream behind stack k, and the sum of its auxiliary values."""
        module, stack = self.model.stacks[k], self.spec.stacks[k]
        layout = stack.layout if stack.layout != "btc" else stack.inner
        reading, first = self.readings[k], x
        streams = self.expand(x, k)
        start = streams
        number, aux, seen = 0, None, []
        order = module.order
        total = sum(len(block.steps) for block in order)
        out = None
        for index, block in enumerate(order):
            if index and stack.inject == "constant":
                streams = 0.8 * streams + 0.3 * start
            elif index and stack.inject == "learned":
                streams = module.mix[0] * streams + module.mix[1] * start
            elif index and stack.inject == "plain":
                streams = streams + start
            for step in block.steps:
                seen.clear()
                streams = self.step(streams, k, number, step, layout, ctx, seen)
                number += 1
                last = number == total
                if last and not reading.norm_last:
                    streams = self.collapse(streams, k).unsqueeze(-2)
                streams = self.norm(streams, step, layout)
            last = number == total
            out = self.collapse(streams, k) if last else None  # the sublayers' end
            if stack.aux == "branch" and seen and not isinstance(seen[0], tuple):
                if block.steps[-1].site.place != "inside":
                    extra = seen[0].square().mean()
                    aux = extra if aux is None else aux + extra
            elif stack.aux == "peek":
                here = streams.mean(-2) if out is None else out
                extra = here.square().mean()
                aux = extra if aux is None else aux + extra
            if last and stack.inject == "long":
                early = reading.long_first or streams.shape[-2] == 1
                out = out + first if early else self.collapse(streams + start, k)
        return out, aux

    def __call__(self, x, y=None):
        spec, model = self.spec, self.model
        inputs, x = x, model.start(x)
        ctx = model.context(x, inputs)
        if spec.topology == "encdec":
            memory, aux = self.stack(0, x, ctx)
            start = model.start(y)
            x, more = self.stack(1, start, {**model.context(start, y), "memory": memory})
            extra = [aux, more]
        elif spec.topology == "towers":
            runs = [self.stack(k, x, ctx) for k in range(len(spec.stacks))]
            x, extra = torch.cat([end for end, _ in runs], -1), [aux for _, aux in runs]
        elif spec.topology == "interleaved":
            (left, _), (right, _) = self.stack(0, x, ctx), self.stack(1, x, ctx)
            x, extra = left * torch.sigmoid(right), []
        else:
            extra = []
            for k in range(len(spec.stacks)):
                if k:
                    x = model.project[k - 1](x)
                x, aux = self.stack(k, x, ctx)
                extra.append(aux)
        found = [a for a in extra if a is not None]
        return (model.finish(x), sum(found)) if found else (model.finish(x),)
