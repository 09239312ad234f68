"""An independent reference: the plain model, run eagerly, with its residual adds kept on n streams.

Nothing of the tool's tracing or rewriting takes part. A first run of the plain model writes down
which function call made which tensor. In a second run the stream is a tensor of its own kind that
holds n streams. The model's own Python decides what happens to it; every function call passes
through a mode, which gives the residual adds, named by source line and module, their mixing, lets
operations between two adds work on each stream by itself, and hands anything else h = pre(x).

It takes from the tool the source lines of the sites, their streams, and the parameters.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field

import torch
from oracle import mhc_maps
from torch.overrides import TorchFunctionMode

ADDS = {"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "sub_", "__sub__", "__isub__"}
ADDCMULS = {"addcmul", "addcmul_", "lerp", "lerp_"}
IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
SAME_VALUE = {
    "to", "float", "double", "half", "bfloat16", "type_as", "type", "view", "reshape", "contiguous",
    "clone", "detach", "unsqueeze", "squeeze", "flatten", "unflatten",
}  # fmt: skip
SCALES = {"mul", "mul_", "__mul__", "__rmul__", "div", "__truediv__"}
HEAVY = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "addmm", "baddbmm", "einsum",
    "conv1d", "conv2d", "conv3d", "embedding", "scaled_dot_product_attention", "cumsum",
    "multi_head_attention_forward",
}  # fmt: skip
NN = os.path.join(os.path.dirname(torch.__file__), "nn", "modules") + os.sep
TORCH = os.path.dirname(torch.__file__) + os.sep


def leaves(value):
    """Tensors in nested containers, by type alone: no call of a tensor method."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in leaves(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in leaves(v)]
    return []


def mapped(value, change):
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: mapped(v, change) for k, v in value.items()}
    if type(value) in (tuple, list, torch.Size):
        return type(value)(mapped(v, change) for v in value)
    return value


def in_place(name):
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def caller():
    """The innermost source line of model code (layers of torch.nn are model code)."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        inner = name.startswith(TORCH) and not name.startswith(NN)
        if not inner and not name.endswith(os.sep + "module.py") and name != __file__:
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@dataclass
class Node:
    """A tensor of the first run: the function that made it and what it was made of."""

    name: str
    parents: list
    ancestors: int
    event: tuple = ()
    terms: list = field(default_factory=list)
    line: str = ""
    modules: tuple = ()
    is_float: bool = True


class Calls(TorchFunctionMode):
    """Names each function call by the module call it happens in and its number there.

    A global number would not do: how many functions a mixture of experts calls depends on which
    experts were chosen.
    """

    def __init__(self):
        super().__init__()
        self.stack, self.counts = [["", 0, 0]], Counter()

    def run(self, model, inputs):
        handles = []
        for name, module in model.named_modules():
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self.enter(name)),
                module.register_forward_hook(self.leave),
            ]
        try:
            with torch.compiler.set_stance("force_eager"), self:
                return model(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, name):
        self.counts[name] += 1
        self.stack.append([name, self.counts[name], 0])

    def leave(self, *_):
        self.stack.pop()

    @property
    def event(self):
        return tuple(self.stack[-1])

    def count(self):
        event = self.event
        self.stack[-1][2] += 1
        return event


class Watch(Calls):
    """The first run."""

    def __init__(self):
        super().__init__()
        self.nodes, self.maker, self.kept, self.same = [], {}, [], set()

    def node_of(self, tensor):
        if id(tensor) not in self.maker:
            self.kept.append(tensor)
            self.maker[id(tensor)] = len(self.nodes)
            self.nodes.append(Node("root", [], 0))
        return self.maker[id(tensor)]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        inputs = leaves((args, kwargs))
        operands = [self.node_of(t) for t in inputs]
        out = func(*args, **kwargs)
        results = leaves(out)
        if name == "__setitem__":
            results = [args[0]]
        if not results:
            return out
        event = self.count()
        if not in_place(name) and all(any(r is t for t in inputs) for r in results):
            self.same.add(event)
            return out
        bits = 0
        for i in operands:
            bits |= self.nodes[i].ancestors | 1 << i
        for result in results:
            if not in_place(name) and any(result is t for t in inputs):
                continue
            self.kept.append(result)
            for tensor in {id(result): result, id(result._base): result._base}.values():
                if tensor is result or (tensor is not None and in_place(name)):
                    self.maker[id(tensor)] = len(self.nodes)
            terms = [self.maker_at(operands, inputs, a) for a in args[:3]]
            terms = [t for t in terms if t is not None]
            line = caller() if name in ADDS | ADDCMULS else ""
            modules = tuple(module for module, *_ in self.stack)
            floats = result.dtype.is_floating_point
            self.nodes.append(Node(name, operands, bits, event, terms, line, modules, floats))
        return out

    @staticmethod
    def maker_at(operands, inputs, argument):
        for node, tensor in zip(operands, inputs, strict=True):
            if tensor is argument:
                return node
        return None


@dataclass
class Site:
    """A residual add: nodes of the add, of its skip, of the branch's terms and absorbed adds.

    `path` leads from the state that the branch reads, through casts and scales, to the skip;
    `links` are the operations on the stream between earlier states of it and the skip.
    """

    add: int
    skip: int
    branch: list
    absorbed: list
    module: str
    line: str
    path: list = field(default_factory=list)
    links: list = field(default_factory=list)
    connection: str = ""


class Plan:
    """Which nodes of the first run are residual adds, links between them, starts and ends."""

    def __init__(self, model, inputs, found):
        watch = Watch()
        with torch.no_grad():
            watch.run(model, inputs)
        self.nodes, self.same = watch.nodes, watch.same
        self.inputs = {k: watch.maker.get(id(v)) for k, v in inputs.items()}
        wanted = Counter((s.source, s.module) for s in found)
        sites = self._sites({line for line, _ in wanted})
        self.streams, order = {}, sorted(sites, key=lambda s: s.add)
        for stated in found:
            fit = [s for s in order if s.line == stated.source and self._in(s, stated.module)]
            assert fit, f"no residual add at {stated.source} in {stated.module!r}"
            order.remove(fit[0])
            fit[0].module = stated.module
            self.streams.setdefault(stated.stream, []).append(fit[0])
        self._name_connections()
        self.trailing = {}
        for chain in self.streams.values():
            self._link(chain)

    def _in(self, site, module):
        return module in self.nodes[site.add].modules

    def _reads(self, node, other):
        return bool(self.nodes[node].ancestors >> other & 1)

    def _behind(self, node, steps=1 << 30):
        """The value behind casts, views, and scaling by a number or a parameter."""
        while steps and self.nodes[node].name in SAME_VALUE | SCALES | {"__radd__"}:
            if self.nodes[node].name == "__radd__" and len(self.nodes[node].parents) > 1:
                break  # sum() starts with 0 + x
            made = [p for p in self.nodes[node].parents if self.nodes[p].ancestors]
            made = made or self.nodes[node].parents[:1]
            if len(made) != 1:
                break
            node, steps = made[0], steps - 1
        return node

    def _pick(self, terms, fixed_skip=False):
        for i, skip in enumerate(terms[:1] if fixed_skip else terms):
            others = [t for t in terms[:i] + terms[i + 1 :] if self.nodes[t].ancestors]
            if others and all(self._reads(t, self._behind(skip)) for t in others):
                return skip, others
        return None

    def _sites(self, lines):
        """Adds at the stated lines one of whose terms all the others were computed from."""
        sites, absorbed = [], set()
        readers = Counter(p for node in self.nodes for p in set(node.parents))
        for index in reversed(range(len(self.nodes))):
            node = self.nodes[index]
            if node.line not in lines or index in absorbed:
                continue
            terms, inner = node.terms[:2] if node.name in ADDS else node.terms, []
            picked = self._pick(terms, node.name in ADDCMULS or "sub" in node.name)
            if picked is None and node.name in ADDS and "sub" not in node.name:
                flat = []
                for term in terms:
                    below = self.nodes[term]
                    open_ = below.name in ADDS and len(below.terms) == 2 and readers[term] == 1
                    flat += below.terms if open_ else [term]
                    inner += [term] if open_ else []
                picked = self._pick(flat)
            if picked is not None:
                skip, branch = picked
                inner = [i for i in inner if skip in self.nodes[i].terms]
                sites.append(Site(index, skip, branch, inner, "", node.line))
                absorbed.update(inner)
        return sites

    def _name_connections(self):
        blocks = {}
        for chain in self.streams.values():
            for site in chain:
                blocks.setdefault(site.module, []).append(site)
        for module, sites in blocks.items():
            for k, site in enumerate(sorted(sites, key=lambda s: s.add)):
                site.connection = f"{module}.mhc.{k}".lstrip(".")

    def _link(self, chain):
        """What works on each stream by itself, between the adds and behind the last one."""
        states, inside = set(), set()
        for site in chain:
            site.path = self._path(site)
            if not states:
                states.add(site.path[0])
            site.links = self._lifted(states, inside, site.skip)
            assert site.skip in states | set(site.links), f"{site} does not continue its stream"
            states |= {site.add, *site.links}
            inside |= {i for b in site.branch for i in self._region(b, site.path[0])}
        last = chain[-1]
        patterns = self._patterns(chain, inside)
        ends = {pattern[-1] for pattern in patterns}
        for stop in reversed(range(last.add + 1, len(self.nodes))):
            node = self.nodes[stop]
            if node.name in ends and last.module in ("", *node.modules):
                tail = self._lifted({last.add}, inside, stop)
                if stop in tail and self._names(tail) in patterns:
                    self.trailing[last.add] = tail
                    break

    def _patterns(self, chain, inside):
        """What stands between an add and the next skip: in the last block, or norms anywhere."""
        owners, found = {"", *(site.module for site in chain)}, set()
        for before, site in zip(chain, chain[1:], strict=False):
            links = self._lifted({before.add}, inside, site.path[0])
            modules = [self.nodes[i].modules for i in links]
            here = all(chain[-1].module in ("", *m) for m in modules)
            if here or all(m[-1] not in owners for m in modules):
                found.add(self._names(links))
        return found - {()}

    def _names(self, links):
        """The functions of a post-norm or the like; changes of sizes and casts do not count."""
        return tuple(name for i in links if (name := self.nodes[i].name) not in SAME_VALUE)

    def _path(self, site):
        """From the skip back through casts and scales to the value that the branch reads."""
        path, at, before = [site.skip], site.skip, None
        while before != at:
            before, at = at, self._behind(at, 1)
            path.insert(0, at)
        region = {i for b in site.branch for i in self._region(b, path[0])}
        inside = {p for i in region for p in self.nodes[i].parents}
        read = [k for k, i in enumerate(path) if i in inside]
        return path[read[0] :] if read else [site.skip]

    def _region(self, branch, start):
        """The operations of a sublayer: those that depend on `start`, with the branch itself."""
        bits = self.nodes[branch].ancestors | 1 << branch
        return [
            i for i in range(start + 1, branch + 1) if bits >> i & 1 and self._reads(i, start)
        ]  # fmt: skip

    def _lifted(self, states, inside, stop):
        """Light operations outside sublayers that lead from states of a stream to `stop`."""
        if stop in states:
            return []
        bits, lifted = self.nodes[stop].ancestors | 1 << stop, set()
        for i in range(min(states) + 1, stop + 1):
            node = self.nodes[i]
            if not bits >> i & 1 or node.name in HEAVY or not node.is_float:
                continue
            if i not in states and i not in inside:
                if any(p in states or p in lifted for p in node.parents):
                    lifted.add(i)
        needed, todo = set(), [stop]
        while todo:
            at = todo.pop()
            if at in lifted and at not in needed:
                needed.add(at)
                todo += self.nodes[at].parents
        return sorted(needed)


class Streams(torch.Tensor):
    """n streams that look like one tensor; its own data is NaN, so that no use goes unnoticed."""

    @staticmethod
    def of(streams, node, branch=None):
        with torch._C.DisableTorchFunction():
            self = torch.full_like(streams[0].detach(), float("nan")).as_subclass(Streams)
        self.streams, self.node, self.branch = list(streams), node, branch
        return self


class Lockstep(Calls):
    """The second run, with parameters taken from a transformed model."""

    def __init__(self, plan, transformed, n):
        super().__init__()
        self.plan, self.n, self.ended = plan, n, set()
        self.parameters = dict(transformed.named_parameters())
        self.at = {}
        for index, node in enumerate(plan.nodes):
            if node.event:
                self.at.setdefault(node.event, []).append(index)
        self.sites, self.starts, self.links, self.absorbed = {}, set(), set(), {}
        self.readers, self.collapse_at, self.maps, self.alias = {}, {}, {}, {}
        for chain in plan.streams.values():
            for site in chain:
                self.sites[site.add] = site
                self.links.update(site.links)
                self.absorbed.update((i, site) for i in site.absorbed)
                for i in site.path:
                    self.readers.setdefault(i, []).append(site)
            self.starts.add(chain[0].path[0])
            tail = plan.trailing.get(chain[-1].add, [])
            self.links.update(tail)
            self.collapse_at[tail[-1] if tail else chain[-1].add] = self._collapse_name(chain[-1])

    def _collapse_name(self, site):
        prefix = site.connection.rsplit(".", 1)[0]
        ends = [c[-1] for c in self.plan.streams.values() if c[-1].module == site.module]
        parts = [c for c in self.plan.streams.values() if any(s.module == site.module for s in c)]
        number = "" if len(ends) == 1 else next(i for i, c in enumerate(parts) if c[-1] is site)
        return f"{prefix}.collapse{number}.weight"

    def run(self, model, inputs):
        inputs = {k: self.start(self.plan.inputs[k], v) for k, v in inputs.items()}
        out = super().run(model, inputs)
        assert self.ended == set(self.collapse_at), "a stream did not reach its end"
        return out

    def start(self, node, value):
        return Streams.of([value] * self.n, node) if node in self.starts else value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.alias:
            args, kwargs = mapped(args, self.known), mapped(kwargs, self.known)
        held = [t for t in leaves((args, kwargs)) if type(t) is Streams]
        made = self.at.get(self.event, [])
        if not held:
            out = func(*args, **kwargs)
            if leaves(out) or name == "__setitem__":
                self.count()
                if any(i in self.starts for i in made):
                    if in_place(name):  # a tensor that the caller holds already
                        self.alias[id(args[0])] = self.start(made[0], args[0])
                        return out if out is None else self.alias[id(args[0])]
                    assert isinstance(out, torch.Tensor)
                    return self.start(made[0], out)
            return out
        if not in_place(name):
            out = func(*mapped(args, self.first), **mapped(kwargs, self.first))
            if not leaves(out):
                return out  # a size, a dtype
        if self.event in self.plan.same:
            out = func(*mapped(args, self.first), **mapped(kwargs, self.first))
            if leaves(out):
                self.count()
                return next(t for t in leaves((args, kwargs)) if self.first(t) is out)
        if made and made[0] in self.sites:
            return self.done(made[0], self.mix(self.sites[made[0]], name, args, kwargs), held[0])
        if made and made[0] in self.absorbed:
            self.count()
            assert name in ADDS
            plain = [t for t in args if type(t) is not Streams][0]
            return Streams.of(held[0].streams, held[0].node, plain)
        if made and made[0] in self.links:
            out = [
                func(*mapped(args, lambda t, i=i: self.pick(t, i)),
                     **mapped(kwargs, lambda t, i=i: self.pick(t, i)))
                for i in range(self.n)
            ]  # fmt: skip
            return self.done(made[0], out, held[0] if in_place(name) else None)

        def read(t):
            return self.read(t, made)

        out = func(*mapped(args, read), **mapped(kwargs, read))
        if leaves(out) or name == "__setitem__":
            self.count()
        return out

    def known(self, tensor):
        return self.alias.get(id(tensor), tensor)

    @staticmethod
    def first(tensor):
        return tensor.streams[0] if type(tensor) is Streams else tensor

    @staticmethod
    def pick(tensor, i):
        return tensor.streams[i] if type(tensor) is Streams else tensor

    def read(self, x, made):
        """For a sublayer h = pre(x); whatever else looks at the stream gets the mean."""
        if type(x) is not Streams:
            return x
        nodes = self.plan.nodes
        for site in sorted(self.readers.get(x.node, []), key=lambda s: s.add):
            if any(i in site.branch or nodes[b].ancestors >> i & 1
                   for i in made for b in site.branch):  # fmt: skip
                pre, _, _ = self.coefficients(site, x)
                return sum(p.unsqueeze(-1) * s for p, s in zip(pre, x.streams, strict=True))
        return sum(x.streams) / self.n

    def coefficients(self, site, x):
        """The maps of a site, from the state that its sublayer reads first."""
        key = site.add, tuple(x.size()[:-1])
        if key not in self.maps:
            weights = (self.parameters[f"{site.connection}.{k}"] for k in ("phi", "alpha", "bias"))
            self.maps[key] = mhc_maps(x.streams, *weights, "paper")
        return self.maps[key]

    def mix(self, site, name, args, kwargs):
        """x'_i = sum_j res_ij x_j + post_i F, with F in whichever form the add has it."""
        x, scale = next(t for t in args if type(t) is Streams), 1
        if name in ADDCMULS:
            assert x is args[0]
            f = args[1] * args[2] * kwargs.get("value", 1)
            if "lerp" in name:
                scale = 1 - args[2]
        else:
            f = next((t for t in args if type(t) is not Streams), kwargs.get("other"))
            f = f * kwargs.get("alpha", 1)
            assert kwargs.get("alpha", 1) == 1 or x is args[0]
            if "sub" in name:
                assert x is args[0]
                f = -f
        if x.branch is not None:
            f = f + x.branch
        _, post, res = self.coefficients(site, x)
        return [
            scale * sum(r.unsqueeze(-1) * s for r, s in zip(row, x.streams, strict=True))
            + p.unsqueeze(-1) * f
            for row, p in zip(res, post, strict=True)
        ]

    def done(self, node, streams, target):
        self.count()
        if node in self.collapse_at:
            self.ended.add(node)
            weight = self.parameters[self.collapse_at[node]]
            return sum(w * s for w, s in zip(weight, streams, strict=True))
        return Streams.of(streams, node)


def reference_result(plain, transformed, found, inputs, n):
    """What a transformed model should return, computed with the plain model and n streams."""
    accepted = [s for s in found if s.accepted]
    plan = Plan(plain, inputs, accepted)
    return Lockstep(plan, transformed, n).run(plain, inputs)
