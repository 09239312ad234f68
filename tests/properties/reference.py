"""What mHC makes of a `Spec`, written down on n streams with nothing but `mc.reference`.

It calls the sublayers of the untouched model and does all that lies between them itself. Streams
are [B, T, n, C] throughout: layouts, containers and the places of the adds are the model's
affair. With one stream and no parameters it is the plain model, which checks the generator.
"""

import itertools
from itertools import pairwise
from typing import NamedTuple

import torch
from generator import from_layout, to_layout

import mhc_compile as mc


def true_sites(spec):
    """For each stream, in the order of their first adds: `(stack, block, step)` of its sites."""
    found = []
    for k, stack in enumerate(spec.stacks):
        order = [*range(len(stack.blocks))] * (2 if stack.repeat else 1)
        joint = [-1] if spec.topology == "joint" else []  # the attention ahead of each block
        found.append([(k, b, j) for b in order for j in (*joint, *range(len(stack.blocks[b])))])
    return found


def open_readings(spec):
    """For each stack the readings that are both right, as arguments of `Reading`."""
    options = []
    for stack in spec.stacks:
        norms = [site.norm for sites in stack.blocks for site in sites]
        norms *= 2 if stack.repeat else 1
        kinds = [site.norm_kind for sites in stack.blocks for site in sites if site.norm == "post"]
        kinds *= 2 if stack.repeat else 1
        # Nothing tells a post-norm behind a single site, one of a class that stands nowhere else,
        # or a norm that some skips start from, from a model's final norm, if the stream ends there.
        between = [norm == "post" or after == "before" for norm, after in pairwise(norms)]
        lone = bool(kinds) and kinds[-1] not in kinds[:-1]
        unclear = not between or not all(between) or lone
        trailing = norms[-1] == "post" and (unclear or stack.hook == "halve")
        ends = stack is spec.stacks[-1] and spec.topology in ("single", "encdec", "stages")
        headed = ends and spec.head in ("norm", "logits") and (unclear and any(between))
        headed |= ends and spec.head in ("norm", "logits") and "before" in norms
        options.append([
            Reading(*choice) for choice in itertools.product(
                (True, False) if trailing else (True,),
                (False, True) if stack.inject == "long" else (False,),
                (False, True) if headed else (False,),
                (False, True) if stack.states == "sum" else (False,),
            )
        ])  # fmt: skip
    return options


class Reading(NamedTuple):
    """`norm_last`: a trailing post-norm is applied to each stream, then they are collapsed.

    `long_first`: the streams are collapsed, then a skip around all of them is added.
    `head_first`: the model's final norm is applied to each stream, then they are collapsed.
    `sum_first`: states of all layers are summed stream by stream, then collapsed.
    """

    norm_last: bool = True
    long_first: bool = False
    head_first: bool = False
    sum_first: bool = False


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
            if step.site.scale == "gated":
                f = f * torch.sigmoid(step.gate(h))
                seen[:] = [f]
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
        if scale == "highway":  # refused by the library, so this is the plain model
            gate = torch.sigmoid(step.highway(x))
            f = self.branch_of(step, layout, ctx, seen)(x.squeeze(-2)).unsqueeze(-2)
            return gate * x + (1 - gate) * f
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

    # --- models -----------------------------------------------------------------------------

    def stack(self, k, x, ctx):
        """Runs one stack; returns its end, the sum of its auxiliary values, and its states."""
        run = StackRun(self, k, x, ctx)
        for index in range(len(run.order)):
            run.block(index)
        return run.end, run.aux, run.states

    def joint(self, x, y, contexts):
        """Two stacks whose blocks alternate with attention over the tokens of both."""
        runs = [StackRun(self, k, state, contexts[k]) for k, state in enumerate((x, y))]
        for index, block in enumerate(self.model.joint):
            states = [run.streams for run in runs]
            h, post, res = zip(*map(self.read, states, runs), strict=True)
            branches = block.branches(*h)
            for k, run in enumerate(runs):
                run.streams = self.merge(states[k], branches[k], post[k], res[k])
                run.number += 1
            for run in runs:
                run.block(index)
        return [run.end for run in runs]

    def read(self, x, run):
        if self.connections is None or self.spec.n == 1:
            return x.squeeze(-2), None, None
        connection = self.connections[run.k][run.number]
        pre, post, res = mc.reference.coefficients(x, *connection, n=self.spec.n)
        return mc.reference.apply_pre(x, pre), post, res

    def merge(self, x, f, post, res):
        if post is None:
            return x + f.unsqueeze(-2)
        return mc.reference.apply_post_res(x, f, post, res)

    def __call__(self, x, y=None):
        spec, model, topology = self.spec, self.model, self.spec.topology
        inputs, x = x, model.start(x)
        ctx = model.context(x, inputs)
        if topology == "encdec":
            memory, *first = self.stack(0, x, ctx)
            start = model.start(y)
            x, *second = self.stack(1, start, {**model.context(start, y), "memory": memory})
            extra = [first, second]
        elif topology in ("towers", "fork"):
            ends, extra = [], []
            for k in range(len(spec.stacks)):
                end, *more = self.stack(k, x, ctx)
                if topology == "fork" and k == 0:
                    x = end
                else:
                    ends.append(end)
                extra.append(more)
            x = torch.cat(ends, -1)
        elif topology == "interleaved":
            x, extra = torch.cat([self.stack(k, x, ctx)[0] for k in range(2)], 1), []
        elif topology == "joint":
            start = model.start(y)
            x, extra = torch.cat(self.joint(x, start, [ctx, model.context(start, y)]), 1), []
        else:
            extra = []
            for k in range(len(spec.stacks)):
                if k:
                    x = model.project[k - 1](x)
                x, *more = self.stack(k, x, ctx)
                extra.append(more)
        found = [aux for aux, _ in extra if aux is not None]
        states = [state for _, all_states in extra for state in all_states]
        return (self.finish(x), *([sum(found)] if found else []), *states)

    def finish(self, x):
        """The head; its norm may have been applied before the streams were collapsed."""
        norm = self.model.norm if hasattr(self.model, "norm") else None
        if self.readings[-1].head_first and norm is not None:
            self.model.norm = torch.nn.Identity()
        try:
            return self.model.finish(x)
        finally:
            if norm is not None:
                self.model.norm = norm


class StackRun:
    """One stack on n streams, block by block."""

    def __init__(self, reference, k, x, ctx):
        self.reference, self.k, self.ctx, self.first = reference, k, ctx, x
        self.module, self.stack = reference.model.stacks[k], reference.spec.stacks[k]
        self.reading, self.order = reference.readings[k], reference.model.stacks[k].order
        self.streams = self.start = reference.expand(x, k)
        self.number, self.aux, self.states, self.end, self.saved = 0, None, [], None, []
        self.layout = self.stack.layout if self.stack.layout != "btc" else self.stack.inner

    def block(self, index):
        """Runs one block and what stands between it and the one before."""
        block, stack, seen = self.order[index], self.stack, []
        final = index == len(self.order) - 1
        if index and stack.pad:
            self.streams = self.streams * self.ctx["pad"].unsqueeze(-1)
        if index and stack.inject == "constant" or stack.inject == "inside":
            self.streams = 0.8 * self.streams + 0.3 * self.start
        elif index and stack.inject == "learned":
            mix = self.module.mix
            self.streams = mix[0] * self.streams + mix[1] * self.start
        elif index and stack.inject == "plain":
            self.streams = self.streams + self.start
        elif stack.inject == "feature":
            self.streams = self.streams + self.module.feature(self.ctx["like"]).unsqueeze(-2)
        elif stack.inject == "unet" and self.saved and 2 * index >= len(self.order):
            self.streams = self.streams + 0.5 * self.saved.pop()
        self.saved.append(self.streams)
        for j, step in enumerate(block.steps):
            seen.clear()
            if step.site.norm == "before":
                self.streams = getattr(step.norm_skip, "norm", step.norm_skip)(self.streams)
            self.streams = self.reference.step(
                self.streams, self.k, self.number, step, self.layout, self.ctx, seen
            )
            self.number += 1
            if final and j == len(block.steps) - 1 and not self.reading.norm_last:
                self.streams = self.reference.collapse(self.streams, self.k).unsqueeze(-2)
            self.streams = self.reference.norm(self.streams, step, self.layout)
        self.observe(block, seen, final)
        if stack.hook == "halve":
            self.streams = 0.5 * self.streams
        if stack.states == "out":
            self.states.append(self.end_state() if final else self.streams.mean(-2))
        elif stack.states == "sum":
            whole = self.reading.sum_first or final
            state = self.streams if whole else self.streams.mean(-2, keepdim=True)
            self.states.append((0.5 + index) * state)
        if final:
            self.finish()

    def observe(self, block, seen, final):
        """What the block returns beside the stream."""
        extra = None
        if self.stack.aux == "branch" and seen and not isinstance(seen[0], tuple):
            if block.steps[-1].site.place != "inside":
                extra = seen[0].square().mean()
        elif self.stack.aux == "peek":
            here = self.end_state() if final else self.streams.mean(-2)
            extra = here.square().mean()
        if extra is not None:
            self.aux = extra if self.aux is None else self.aux + extra

    def end_state(self):
        """The stream behind the last block, before anything that follows the blocks."""
        return self.reference.collapse(self.streams, self.k)

    def finish(self):
        """Collapses the streams; a long skip may be added before or behind."""
        collapse, streams = self.reference.collapse, self.streams
        if self.reading.head_first and self.k == len(self.reference.spec.stacks) - 1:
            streams = self.reference.model.norm(streams)
        if stack_sum := self.stack.states == "sum":
            *middle, streams = self.states
            streams = streams + sum(s for s in middle if s.shape == streams.shape)
        self.end = collapse(streams, self.k)
        if stack_sum:
            self.end = self.end + sum(s.squeeze(-2) for s in middle if s.shape != streams.shape)
            self.states = []
        if self.stack.inject == "long":
            early = self.reading.long_first or streams.shape[-2] == 1
            start = self.start
            self.end = self.end + self.first if early else collapse(streams + start, self.k)
