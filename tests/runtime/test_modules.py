"""`HyperConnection` and `StreamCollapse`, for models written with mHC from the start."""

from dataclasses import replace

import pytest
import torch
from models import normal
from torch import nn

import mhc_compile as mc
from mhc_compile.errors import ConfigError
from mhc_compile.runtime.modules import StreamCollapse, unequal_weights

STREAMS = [1, 2, 3, 4, 8]
C = 6


def connection_of(n, **kwargs):
    index = kwargs.pop("index", 0)
    torch.manual_seed(n)
    return mc.HyperConnection(C, mc.MHCConfig(streams=n, **kwargs), index=index)


@pytest.mark.parametrize("connection", ["mhc", "hc"])
@pytest.mark.parametrize("n", STREAMS)
@torch.no_grad()
def test_the_start_is_the_plain_residual(n, connection):
    module = connection_of(n, connection=connection)
    x = normal(2, 5, C, seed=n)
    streams = mc.expand_streams(x, n)
    h, state = module.pre(streams)
    torch.testing.assert_close(h, x, rtol=1e-6, atol=1e-6)
    out = module.post(streams, torch.tanh(h), state)
    assert out.shape == (2, 5, n, C)
    expected = (x + torch.tanh(x)).unsqueeze(-2).expand_as(out)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("convention", mc.CONVENTIONS)
@torch.no_grad()
def test_every_convention_starts_near_the_residual_or_says_why_not(convention):
    if mc.CONVENTIONS[convention].post_multiplier <= 1:
        with pytest.raises(ConfigError, match="init='paper'"):
            connection_of(4, convention=convention)
        return
    module = connection_of(4, convention=convention)
    pre, post, res = module.coefficients(normal(3, 4, C))
    torch.testing.assert_close(pre.sum(-1), torch.ones(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(post, torch.ones(3, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(res.sum(-1), torch.ones(3, 4), rtol=0, atol=1e-4)
    assert (res.diagonal(dim1=-2, dim2=-1) > 0.9).all()


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_pre_gates_are_unequal_and_rotate_with_the_index(n):
    gates = []
    for index in range(2 * n):
        pre = connection_of(n, index=index).coefficients(normal(1, n, C))[0][0]
        assert int(pre.argmax()) == index % n
        assert pre.sort().values.diff().min() > 1e-3
        gates.append(pre.detach())
    torch.testing.assert_close(gates[0], gates[n])


@pytest.mark.parametrize("n", STREAMS)
def test_init_paper_uses_alpha_init(n):
    module = connection_of(n, init="paper")
    if n > 1:
        assert torch.equal(module.alpha, torch.full((3,), 0.01))


@torch.no_grad()
def test_post_mixes_as_the_equation_says():
    module = connection_of(3)
    module.alpha.fill_(1.0)
    x, f = normal(3, C), normal(C, seed=1)
    _, state = module.pre(x)
    out = module.post(x, f, state)
    for i in range(3):
        by_hand = sum(state.res[i, j] * x[j] for j in range(3)) + state.post[i] * f
        torch.testing.assert_close(out[i], by_hand)


def test_one_stream_has_no_parameters():
    module = connection_of(1)
    assert list(module.parameters()) == []
    x = normal(2, 1, C)
    h, state = module.pre(x)
    assert torch.equal(h, x[:, 0])
    assert torch.equal(module.post(x, h, state), x + h.unsqueeze(-2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_streams_keep_their_dtype(dtype):
    module = connection_of(4)
    x = mc.expand_streams(normal(2, C).to(dtype), 4)
    h, state = module.pre(x)
    assert h.dtype == dtype
    assert state.res.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert module.post(x, h, state).dtype == dtype


@pytest.mark.parametrize("shape", [(2, C), (2, 3, C), (2, 4, C + 1), (C,)], ids=str)
def test_a_wrong_shape_names_the_right_one(shape):
    with pytest.raises(mc.MHCError, match=r"\[\.\.\., 4, 6\].*expand_streams") as error:
        connection_of(4).pre(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"channels": 0}, "channels"),
        ({"channels": 2.0}, "channels"),
        ({"channels": True}, "channels"),
        ({"channels": 4, "index": -1}, "index"),
    ],
)
def test_wrong_arguments(kwargs, name):
    with pytest.raises(ConfigError, match=f"{name} must be an integer"):
        mc.HyperConnection(**kwargs)


@pytest.mark.parametrize("init", ["preserve", "paper"])
@pytest.mark.parametrize("mode", ["learned", "mean", "sum"])
@pytest.mark.parametrize("n", STREAMS)
@torch.no_grad()
def test_collapse_of_copies(n, mode, init):
    x = normal(2, C, seed=n)
    config = mc.MHCConfig(streams=n, collapse=mode, init=init)
    factor = n if mode == "sum" and init == "paper" else 1
    got = StreamCollapse(config)(mc.expand_streams(x, n))
    torch.testing.assert_close(got, factor * x, rtol=1e-6, atol=1e-6)


def head_of(n, **kwargs):
    torch.manual_seed(n)
    return StreamCollapse(mc.MHCConfig(streams=n, collapse="head", **kwargs), C)


@pytest.mark.parametrize("convention", [c for c in mc.CONVENTIONS if c != "tilekernels"])
@pytest.mark.parametrize("n", STREAMS)
@torch.no_grad()
def test_a_head_starts_with_unequal_gates_that_sum_to_one(n, convention):
    head = head_of(n, convention=convention)
    x = normal(2, C, seed=n)
    torch.testing.assert_close(head(mc.expand_streams(x, n)), x, rtol=1e-6, atol=1e-6)
    gates = head(torch.eye(n).unsqueeze(-1).expand(n, n, C))[:, 0]  # stream i of token i is 1
    torch.testing.assert_close(gates, unequal_weights(n), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_head_with_init_paper_depends_on_the_streams():
    x = normal(5, 4, C)
    gates = [head_of(4, init=init)(x).sub(StreamCollapse(mc.MHCConfig(streams=4))(x)).abs().max()
             for init in ("preserve", "paper")]  # fmt: skip
    assert gates[0] < 1e-5 < 1e-4 < gates[1] < 0.1  # alpha is 0, and 0.01


@torch.no_grad()
def test_a_head_weighs_the_streams_by_the_equation():
    head = head_of(3, convention="deepseek_v4", norm_eps=0.5, pre_eps=0.25)
    head.alpha.fill_(0.7)
    head.bias.copy_(normal(3, seed=1))
    x = normal(3, C, seed=2)
    normed = x.flatten() / (x.square().mean() + 0.5).sqrt()
    gates = torch.sigmoid(0.7 * (normed @ head.phi) + head.bias) + 0.25
    torch.testing.assert_close(head(x), sum(gates[i] * x[i] for i in range(3)))
    head._rule = replace(head._rule, norm_eps_place="outside")
    gates = torch.sigmoid(0.7 * (x.flatten() @ head.phi) / (x.square().mean().sqrt() + 0.5)
                          + head.bias) + 0.25  # fmt: skip
    torch.testing.assert_close(head(x), sum(gates[i] * x[i] for i in range(3)))


def test_gradients_of_a_head():
    head = head_of(3, convention="deepseek_v4").double()
    with torch.no_grad():
        head.alpha.fill_(0.8)
    names, values = zip(*head.named_parameters(), strict=True)
    assert names == ("phi", "alpha", "bias")
    x = normal(2, 3, C, seed=1).double().requires_grad_()

    def run(x, *parameters):
        return torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))
    run(x, *values).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_head_keeps_the_streams_dtype_and_computes_in_float32(dtype):
    head = head_of(4, convention="deepseek_v4", init="paper")
    x = normal(2, 4, C).to(dtype)
    got = head(x)
    assert got.dtype == dtype
    exact = head.double()(x.double())
    # One rounding to bfloat16 at the end; float32 parameters otherwise.
    close = 2**-8 if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), exact, rtol=close, atol=1e-6)


@pytest.mark.parametrize("channels", [None, 0, 2.0, True])
def test_a_head_needs_the_channels(channels):
    with pytest.raises(ConfigError, match="channels, an integer"):
        StreamCollapse(mc.MHCConfig(collapse="head"), channels)


def test_collapse_weights_tell_streams_apart():
    x = torch.eye(3).unsqueeze(-1)  # stream i of token i is 1
    got = StreamCollapse(mc.MHCConfig(streams=3))(x)[:, 0]
    assert torch.equal(got, unequal_weights(3))
    assert (got.diff() < -0.05).all()


@pytest.mark.parametrize("n", STREAMS)
def test_unequal_weights_sum_to_one(n):
    weights = unequal_weights(n)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    ratios = weights[1:] / weights[:-1]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 0.60653066))


def test_a_state_dict_without_the_keys_leaves_the_values():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.mhc = nn.Linear(C, C), connection_of(2)

    model, plain = Model(), nn.ModuleDict({"lin": nn.Linear(C, C)})
    before = model.mhc.phi.detach().clone()
    model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(model.mhc.phi, before)
    assert torch.equal(model.lin.weight, plain["lin"].weight)
    state = model.state_dict()
    del state["mhc.alpha"]
    with pytest.raises(RuntimeError, match="mhc.alpha"):
        model.load_state_dict(state, strict=True)


def test_a_model_written_with_connections_trains():
    class Layer(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.connection = mc.HyperConnection(C, mc.MHCConfig(streams=2), index=index)
            self.lin = nn.Linear(C, C)

        def forward(self, x):
            h, state = self.connection.pre(x)
            return self.connection.post(x, torch.tanh(self.lin(h)), state)

    torch.manual_seed(0)
    layers, collapse = nn.Sequential(Layer(0), Layer(1)), StreamCollapse(mc.MHCConfig(streams=2))
    parameters = [*layers.parameters(), *collapse.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    x, target = normal(32, C), normal(32, C, seed=1)
    losses = []
    for _ in range(30):
        loss = (collapse(layers(mc.expand_streams(x, 2))) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad.abs().max() > 1e-6 for p in parameters)


def test_extra_repr_names_the_design():
    assert "channels=6, streams=2, 'mhc', 'paper'" in repr(connection_of(2))
    assert repr(head_of(3)) == "StreamCollapse(streams=3, 'head')"
