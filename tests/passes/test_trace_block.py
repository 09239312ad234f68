"""The tracer by itself: what a graph keeps symbolic, what it guards, and what it must not touch."""

import builtins
import copy
import inspect
from dataclasses import dataclass

import pytest
import torch
from models import MLP, WIDTH, Block, NanoGPT, normal, perturb, tokens
from torch import nn

import mhc_compile as mc
from mhc_compile.errors import TraceError
from mhc_compile.passes import install_blocks
from mhc_compile.passes.add_guards import add_guards
from mhc_compile.passes.trace_block import trace_block


def traced(block, *args, opened=(), **kwargs):
    return trace_block(block, type(block).forward, args, kwargs, frozenset(opened))


def function_of(block, result):
    """The Python function of a graph, as blocks run it."""
    add_guards(result)
    code = result.graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return lambda *args: scope["forward"](block, *args)


def check_equal(block, *calls):
    """Traces on the first call's arguments and runs the graph on all."""
    run = function_of(block, traced(block, *calls[0]))
    for args in calls:
        assert torch.equal(run(*copy.deepcopy(args)), block(*copy.deepcopy(args)))


class Sizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, length, width = x.shape
        y = self.lin(x).view(batch, length, 4, width // 4).transpose(1, 2)
        position = torch.arange(length, device=x.device, dtype=x.dtype).view(-1, 1)
        y = y + position + x.size(1) + torch.zeros((batch, 1, length, 1))
        pad = x.new_zeros(batch, 2, width)
        y = torch.cat([y.transpose(1, 2).reshape(x.size(0), -1, width), pad], 1)
        return y[:, : length + 1] / x.shape[-1] ** 0.5


@torch.no_grad()
def test_sizes_stay_symbolic():
    check_equal(Sizes(), (normal(2, 5, WIDTH),), (normal(3, 9, WIDTH),), (normal(1, 1, WIDTH),))


FACTORIES = {
    "tuple": lambda x: torch.zeros((x.shape[0], x.shape[1])),
    "one": lambda x: torch.zeros(x.shape[1]),
    "several": lambda x: torch.ones(x.shape[1], x.shape[1], device=x.device),
    "unpacked": lambda x: torch.zeros(*x.shape),
    "shape": lambda x: torch.ones(x.shape),
    "arange": lambda x: torch.arange(x.shape[1]),
    "tril": lambda x: torch.tril(torch.ones(x.shape[1], x.shape[1])),
    "eye": lambda x: torch.eye(x.size(1)),
    "method": lambda x: x.new_ones(x.size(0), 3),
    "expand": lambda x: x[:1].expand(x.size(0), -1, -1),
    "repeat": lambda x: x.repeat(x.shape[0], 1, 1),
}


@pytest.mark.parametrize("factory", FACTORIES)
def test_sizes_in_factory_functions(factory):
    class Uses(nn.Module):
        def forward(self, x):
            return FACTORIES[factory](x)

    check_equal(Uses(), (normal(2, 5, WIDTH),), (normal(3, 9, WIDTH),))


class Forms(nn.Module):
    """Python that a block may use."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("shift", torch.rand(WIDTH))
        self.scale = 0.5

    def forward(self, x, mask=None, **kwargs):
        y = self.a(x) * self.scale + self.shift
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        if isinstance(y, torch.Tensor) and y.dim() == 3 and y.dtype == torch.float32:
            y *= self.weight
        first, second = y.chunk(2, -1)
        y = torch.cat((second, first), dim=-1)
        y[..., 0] = 1.0
        for part in y.unbind(1):
            y = y + part.unsqueeze(1) * 0.1
        scale = x.abs().max().item()
        return torch.einsum("bsc,c->bsc", self.b(-y) @ self.b.weight, self.weight) / scale


@torch.no_grad()
def test_python_of_many_forms():
    block = Forms()
    x = normal(2, 5, WIDTH)
    check_equal(block, (x,), (normal(3, 5, WIDTH, seed=1),))
    check_equal(block, (x, normal(2, 5, WIDTH) > 0), (x, normal(2, 5, WIDTH, seed=2) > 0))


class BranchesFirst(Block):
    """Its Python depends on the length."""

    def forward(self, x):
        scale = 1 if x.shape[1] > 4 else 2
        x = x + self.attn(self.ln_1(x))
        return x + scale * self.mlp(self.ln_2(x))


class BranchesLater(Block):
    """The same, read from the stream between two adds."""

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        if x.shape[1] > 4:
            return x + self.mlp(self.ln_2(x))
        return x + 2 * self.mlp(self.ln_2(x))


def variants_of(block):
    rewrite = install_blocks.rewrite_of(block)
    return sum(map(len, rewrite.variants.values()))


@pytest.mark.parametrize("block", [BranchesFirst, BranchesLater])
@torch.no_grad()
def test_a_branch_on_a_size_is_traced_again(block):
    original = NanoGPT(block=block).eval()
    model = mc.transform(copy.deepcopy(original), streams=2)
    before = [variants_of(b) for b in model.h]
    for length in (6, 3, 7, 2, 12, 4):
        idx = tokens(2, length, seed=length)
        torch.testing.assert_close(model(idx), original(idx), rtol=1e-5, atol=1e-5)
    assert [variants_of(b) for b in model.h] == [count + 1 for count in before]


class Cached(Block):
    def forward(self, x, start_pos=0):
        x = x + self.attn(self.ln_1(x)) * (1 + 0.01 * start_pos)
        return x + self.mlp(self.ln_2(x + torch.arange(start_pos, start_pos + 1).float()))


class WithStart(NanoGPT):
    def __init__(self):
        super().__init__(block=Cached)

    def forward(self, idx, start_pos=0):
        x = self.wte(idx)
        for block in self.h:
            x = block(x, start_pos)
        return self.head(self.ln_f(x))


@torch.no_grad()
def test_a_number_argument_is_not_traced_again():
    original = WithStart().eval()
    inputs = {"idx": tokens(), "start_pos": 3}
    model = mc.transform(copy.deepcopy(original), streams=2, example_inputs=inputs)
    before = [variants_of(b) for b in model.h]
    for start in (3, 0, 5, 17):
        idx = tokens(seed=start)
        torch.testing.assert_close(model(idx, start), original(idx, start), rtol=1e-5, atol=1e-5)
    assert [variants_of(b) for b in model.h] == before


class KeepsChanging(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x)) / len(range(x.shape[1]))
        return x + self.mlp(self.ln_2(x))


@torch.no_grad()
def test_too_many_variants_are_an_error():
    model = mc.transform(NanoGPT(block=KeepsChanging), streams=2).eval()
    with pytest.raises(mc.MHCError, match="h.0.* traced .* times"):
        for length in range(1, install_blocks.MAX_VARIANTS + 3):
            model(tokens(1, length))


class LateBranch(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        if self.mlp(x).abs().max().item() > 1e6:
            x = x * 0
        return x + self.mlp(self.ln_2(x))


@torch.no_grad()
def test_a_branch_on_a_result_is_checked_where_it_appears():
    model = NanoGPT(block=LateBranch).eval()
    try:
        mc.transform(model, streams=2)
    except mc.MHCError as error:  # refusing it at once is as good
        assert "test_trace_block.py:" in str(error)
        return
    assert model(tokens()).isfinite().all()
    for parameter in model.h[0].mlp[2].parameters():
        parameter.mul_(1e9)
    with pytest.raises(TraceError, match=r"test_trace_block.py:\d+ saw False .* True"):
        model(tokens())


class Outputs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.one, self.two = kind, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        attention = torch.sigmoid(self.one(x))
        x = x + attention
        x = x + self.two(x)
        if self.kind == "tuple":
            return x, attention, None
        if self.kind == "dict":
            return {"x": x, "attention": attention, "name": "out"}
        return [x, (attention, 3)]


class UsesOutputs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(Outputs(kind) for _ in range(2))

    def forward(self, x):
        total = 0
        for block in self.blocks:
            out = block(x)
            if isinstance(out, dict):
                x, attention = out["x"], out["attention"]
                assert out["name"] == "out"
            elif isinstance(out, tuple):
                x, attention, nothing = out
                assert nothing is None
            else:
                x, (attention, three) = out
                assert three == 3
            total = total + attention.mean()
        return x, total


@pytest.mark.parametrize("kind", ["tuple", "dict", "list"])
@torch.no_grad()
def test_containers_stay_containers(kind):
    model, x = UsesOutputs(kind).eval(), normal(2, 6, WIDTH)
    before = model(x)
    mc.transform(model, example_inputs=x)
    for got, expected in zip(model(x), before, strict=True):
        assert (got - expected).abs().max() <= 1e-5


@dataclass
class Result:
    hidden: torch.Tensor
    extra: int


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.inner(x)
        return (y, None) if x.shape[1] % 2 else Result(y, 7)


class ChecksTypes(nn.Module):
    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__()
        self.one, self.two = Opaque(), MLP()

    def forward(self, x):
        out = self.one(x)
        y = out[0] if isinstance(out, tuple) else out.hidden * out.extra
        x = x + y
        return x + self.two(x)


@torch.no_grad()
def test_type_checks_on_results_see_the_real_types():
    for length in (4, 5):
        block, x = ChecksTypes(), normal(2, length, WIDTH)
        check_equal(block, (x,))
    assert builtins.isinstance is isinstance


@pytest.mark.parametrize("name", ["value", "node", "tracer", "weight"])
@torch.no_grad()
def test_attributes_of_results_may_have_any_name(name):
    class Namespace:
        pass

    class Inner(nn.Module):
        def forward(self, x):
            out = Namespace()
            setattr(out, name, 2 * x)
            return out

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return x + getattr(self.inner(x), name)

    check_equal(Outer(), (normal(2, 5, WIDTH),), (normal(1, 3, WIDTH),))


class Double(torch.autograd.Function):
    """Its backward is not its forward's derivative, so that losing it shows."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 100 * grad


class WithFunction(Block):
    def forward(self, x):
        x = x + Double.apply(self.attn(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


def test_an_autograd_function_is_kept_whole():
    block, x = WithFunction(), normal(2, 5, WIDTH)
    result = traced(block, x)
    targets = [n.target for n in result.graph.nodes if n.op == "call_function"]
    assert any(getattr(t, "__self__", None) is Double for t in targets)
    run = function_of(block, result)
    ours, theirs = (torch.autograd.grad(f(x).sum(), block.attn.out.weight)[0] for f in (run, block))
    assert torch.equal(ours, theirs)
    original = NanoGPT(block=WithFunction).eval()
    model = mc.transform(copy.deepcopy(original), streams=2)
    grads = []
    for m in (original, model):
        m(tokens()).square().mean().backward()
        grads.append(m.h[0].attn.out.weight.grad)
    scale = float(grads[0].abs().max())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4 * scale)


class Cache:
    def __init__(self):
        self.entries = []

    def update(self, value):
        self.entries.append(value)
        return torch.stack(self.entries).sum(0)

    def __len__(self):
        return len(self.entries)


class SideEffects(nn.Module):
    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x, cache):
        self.calls += 1
        x = x + self.drop(self.one(self.norm(x)))
        return x + self.two(cache.update(x))


def test_tracing_leaves_no_trace():
    block, cache, x = SideEffects(), Cache(), normal(2, 5, WIDTH)
    hooked = []
    for module in block.modules():
        module.register_forward_hook(lambda *_: hooked.append(1))
        module.register_forward_pre_hook(lambda *_: hooked.append(1))
    buffers = copy.deepcopy(dict(block.named_buffers()))
    state, value = torch.get_rng_state(), x.clone()
    apply = torch.autograd.Function.__dict__["apply"]
    call = nn.Module.__call__
    result = traced(block, x, cache)
    assert any(n.target == "update" for n in result.graph.nodes)
    assert cache.entries == []
    assert block.calls == 0
    assert all(torch.equal(b, buffers[k]) for k, b in block.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, value)
    assert hooked == []
    assert nn.Module.__call__ is call
    assert torch.autograd.Function.__dict__["apply"] is apply
    # And the graph does have the effects.
    run = function_of(block, result)
    run(x, cache)
    assert len(cache.entries) == 1
    assert not torch.equal(block.norm.running_mean, buffers["norm.running_mean"])


LOOSE = torch.rand(WIDTH)


class Unregistered(nn.Module):
    def forward(self, x):
        return x + torch.relu(x) * LOOSE


class UnregisteredModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Linear(WIDTH, WIDTH)]

    def forward(self, x):
        return x + self.hidden[0](x)


class Control(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + torch.relu(x)
        return x


class ReadsGrad(nn.Module):
    def forward(self, x):
        return x + torch.relu(x) if x.requires_grad else x


ERRORS = [
    (Unregistered, "LOOSE", "register"),
    (UnregisteredModule, "self.hidden[0](x)", "register"),
    (Control, "if x.sum() > 0", "depends on data"),
    (ReadsGrad, "x.requires_grad", "autograd"),
]


@pytest.mark.parametrize(("cls", "text", "hint"), ERRORS, ids=[e[0].__name__ for e in ERRORS])
def test_errors_name_the_line_and_the_remedy(cls, text, hint):
    lines, start = inspect.getsourcelines(cls)
    number = start + next(k for k, line in enumerate(lines) if text in line)
    isinstance_before = builtins.isinstance
    with pytest.raises(TraceError) as error:
        traced(cls(), normal(2, 5, WIDTH))
    message = str(error.value)
    assert cls.__name__ in message
    assert f"test_trace_block.py:{number}" in message
    assert hint in message
    assert builtins.isinstance is isinstance_before


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.outer = nn.Sequential(Block(), nn.Identity())
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.lin(self.outer[0](x))


@torch.no_grad()
def test_opened_modules_are_traced_into_and_others_are_calls():
    block, x = Nested(), normal(2, 5, WIDTH)

    def called(*opened):
        result = traced(block, x, opened=opened)
        run = function_of(block, result)
        assert torch.equal(run(x), block(x))
        return [n.target for n in result.graph.nodes if n.op == "call_module"]

    assert called() == ["outer.0", "lin"]
    inner = [f"outer.0.{name}" for name in ("ln_1", "attn", "ln_2", "mlp")]
    assert called("outer.0") == [*inner, "lin"]


@torch.no_grad()
def test_a_hook_that_a_user_adds_later_is_called():
    block = NanoGPT().eval()
    perturb(mc.transform(block, streams=2))
    seen = []
    block.h[0].ln_1.register_forward_hook(lambda *_: seen.append(1))
    block(tokens())
    assert seen == [1]
