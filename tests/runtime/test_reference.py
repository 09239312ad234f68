"""The reference equations against per-token numpy loops, and against DeepSeek-V4's own module."""

import doctest
import math

import numpy as np
import pytest
import torch

from mhc_compile.conventions import CONVENTIONS, Convention
from mhc_compile.errors import ConfigError, MHCError
from mhc_compile.runtime import reference, sinkhorn

SIZES = [1, 2, 3, 4, 8]
# Norm divisors outside the root, as in Megatron-LM, are no named convention yet.
OUTSIDE = Convention("outside", norm_eps=1e-3, norm_eps_place="outside")
ALL = [*CONVENTIONS.values(), OUTSIDE]


def named(convention):
    return convention.name


def draw(seed, n, channels, *, tokens=(3,), dtype=torch.float64, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    columns = n * n + 2 * n

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = normal(*tokens, n, channels)
    phi = normal(n * channels, columns) * spread / math.sqrt(n * channels)
    return tuple(t.to(dtype) for t in (x, phi, normal(3) + 1, normal(columns)))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def divide(m, by_column, eps):
    """Divides each column or each row of a list of lists by its sum plus eps."""
    n = len(m)
    if by_column:
        sums = [sum(m[i][j] for i in range(n)) + eps for j in range(n)]
        return [[m[i][j] / sums[j] for j in range(n)] for i in range(n)]
    sums = [sum(row) + eps for row in m]
    return [[v / s for v in row] for row, s in zip(m, sums, strict=True)]


def res_by_hand(z, name, iters):
    """Returns res[out][in] of one token from its logits, each convention spelt out."""
    n = len(z)
    m = [[math.exp(v) for v in row] for row in z]
    if name in ("paper", "outside"):
        for _ in range(iters):
            m = divide(divide(m, True, 0), False, 0)
        return m
    if name == "transformer_engine":
        for _ in range(iters):
            m = divide(divide(m, False, 0), True, 0)
    else:
        m = [[v + 1e-6 for v in row] for row in divide(m, False, 0)]
        m = divide(m, True, 1e-6)
        for _ in range(iters - 1):
            m = divide(divide(m, False, 1e-6), True, 1e-6)
    if name == "liger":
        return m
    return [[m[i][j] for i in range(n)] for j in range(n)]


def token_by_hand(x, phi, alpha, bias, name):
    """The coefficients of one token, in Python floats."""
    n, channels = x.shape
    row = [float(x[i, c]) for i in range(n) for c in range(channels)]
    mean_square = sum(v * v for v in row) / len(row)
    eps = {"paper": 1e-20, "transformer_engine": 2.0**-23, "outside": 1e-3}.get(name, 1e-6)
    r = math.sqrt(mean_square) + eps if name == "outside" else math.sqrt(mean_square + eps)

    def logit(column, gate):
        dot = sum(v * float(phi[k, column]) for k, v in enumerate(row))
        return float(alpha[gate]) * dot / r + float(bias[column])

    pre_eps = 1e-6 if name in ("deepseek_v4", "tilekernels") else 0.0
    factor = 1.0 if name == "tilekernels" else 2.0
    pre = [sigmoid(logit(i, 0)) + pre_eps for i in range(n)]
    post = [factor * sigmoid(logit(n + i, 1)) for i in range(n)]
    z = [[logit(2 * n + i * n + j, 2) for j in range(n)] for i in range(n)]
    return pre, post, res_by_hand(z, name, 10 if name == "tilekernels" else 20)


@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("convention", ALL, ids=named)
def test_coefficients_equal_the_formulae(convention, n, channels):
    x, phi, alpha, bias = draw(10 * n + channels, n, channels)
    got = reference.coefficients(x, phi, alpha, bias, n=n, convention=convention)
    for token in range(x.shape[0]):
        by_hand = token_by_hand(x[token].numpy(), phi.numpy(), alpha, bias, convention.name)
        for one, other in zip(got, by_hand, strict=True):
            np.testing.assert_allclose(one[token].numpy(), np.array(other), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("convention", [*CONVENTIONS.values(), OUTSIDE], ids=named)
def test_gradients_equal_finite_differences(convention):
    inputs = tuple(t.requires_grad_() for t in draw(3, 3, 4, tokens=(2,)))

    def function(*args):
        return reference.coefficients(*args, n=3, iters=3, convention=convention)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_iters_and_eps_override_the_convention():
    x, phi, alpha, bias = draw(4, 4, 6)
    default = reference.coefficients(x, phi, alpha, bias, n=4)
    few = reference.coefficients(x, phi, alpha, bias, n=4, iters=1)
    assert torch.equal(default[0], few[0])
    assert (default[2] - few[2]).abs().max() > 1e-3
    damped = reference.coefficients(x, phi, alpha, bias, n=4, eps=1e12)
    torch.testing.assert_close(damped[0], torch.sigmoid(bias[:4]).expand(3, 4), atol=1e-4, rtol=0)
    assert (default[0] - damped[0]).abs().max() > 1e-2


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=named)
def test_transposing_conventions_return_out_by_in(convention):
    # A bias of 8 sends stored element [0, 1] to nearly 1: row 0 is out or in, by convention.
    n = 3
    bias = torch.zeros(n * n + 2 * n)
    bias[2 * n + 1] = bias[2 * n + n + 2] = bias[2 * n + 2 * n] = 8.0
    x, phi = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(12, 15)
    res = reference.coefficients(x, phi, torch.ones(3), bias, n=n, convention=convention)[2]
    cycle = torch.eye(n).roll(1, 1)  # stored [0, 1], [1, 2], [2, 0]
    transposed = convention.name in ("deepseek_v4", "tilekernels", "transformer_engine")
    torch.testing.assert_close(res, cycle.T if transposed else cycle, atol=2e-3, rtol=0)


def v4_config(n, channels):
    transformers = pytest.importorskip("transformers")
    return transformers.DeepseekV4Config(
        hidden_size=channels, hc_mult=n, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n", [2, 4])
def test_deepseek_v4_equals_transformers(n, seed):
    pytest.importorskip("transformers")
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    channels = 24
    module = v4.DeepseekV4HyperConnection(v4_config(n, channels))
    x, phi, alpha, bias = draw(seed, n, channels, tokens=(2, 3), dtype=torch.float32, spread=2.0)
    with torch.no_grad():
        module.fn.copy_(phi.T)
        module.scale.copy_(alpha)
        module.base.copy_(bias)
        post, comb, collapsed = module(x)
        f = torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(seed))
        merged = post.unsqueeze(-1) * f.unsqueeze(-2) + comb.transpose(-1, -2) @ x

    got_pre, got_post, got_res = reference.coefficients(
        x, phi, alpha, bias, n=n, convention="deepseek_v4"
    )
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got_post, post, **close)
    torch.testing.assert_close(got_res, comb.transpose(-1, -2), **close)
    assert (got_res - comb).abs().max() > 1e-3
    torch.testing.assert_close(reference.apply_pre(x, got_pre), collapsed, **close)
    torch.testing.assert_close(reference.apply_post_res(x, f, got_post, got_res), merged, **close)


@pytest.mark.parametrize("seed", [0, 1])
def test_head_equals_transformers(seed):
    pytest.importorskip("transformers")
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    n, channels = 4, 10
    head = v4.DeepseekV4HyperHead(v4_config(n, channels))
    x, phi, alpha, bias = draw(seed, n, channels, tokens=(2, 3), dtype=torch.float32)
    with torch.no_grad():
        head.hc_fn.copy_(phi[:, :n].T)
        head.hc_scale.copy_(alpha[:1])
        head.hc_base.copy_(bias[:n])
        expected = head(x)
    weight = reference.head_weights(x, phi[:, :n], alpha[:1], bias[:n], eps=1e-6, pre_eps=1e-6)
    by_float = reference.head_weights(x, phi[:, :n], alpha[0].item(), bias[:n])
    torch.testing.assert_close(by_float, weight)
    for got in (reference.apply_pre(x, weight), reference.collapse_streams(x, weight)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", SIZES)
def test_post_res_applies_res_and_not_its_transpose(n):
    x, _, _, _ = draw(n, n, 5, tokens=(2,))
    g = torch.Generator().manual_seed(n)
    f, post, res = (torch.randn(2, *s, generator=g).double() for s in [(5,), (n,), (n, n)])
    got = reference.apply_post_res(x, f, post, res)
    expected = torch.zeros_like(x)
    for token in range(2):
        for out in range(n):
            for into in range(n):
                expected[token, out] += res[token, out, into] * x[token, into]
            expected[token, out] += post[token, out] * f[token]
    torch.testing.assert_close(got, expected)
    if n > 1:
        wrong = reference.apply_post_res(x, f, post, res.mT)
        assert (got - wrong).abs().max() > 1e-2


def test_pre_is_a_weighted_sum_of_streams():
    x, _, _, _ = draw(1, 3, 5, tokens=(2,))
    pre = torch.tensor([[1.0, 0.0, 0.0], [0.25, -1.0, 2.0]])
    got = reference.apply_pre(x, pre)
    torch.testing.assert_close(got[0], x[0, 0])
    torch.testing.assert_close(got[1], 0.25 * x[1, 0] - x[1, 1] + 2 * x[1, 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("phi_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision_streams_give_float32_coefficients(dtype, phi_dtype):
    x, phi, alpha, bias = draw(5, 4, 64, tokens=(50,), dtype=torch.float32)
    x, phi = x.to(dtype), phi.to(phi_dtype)
    pre, post, res = reference.coefficients(x, phi, alpha, bias, n=4)
    assert {pre.dtype, post.dtype, res.dtype} == {torch.float32}
    assert (res.sum(-1) - 1).abs().max() < 1e-5
    exact = reference.coefficients(x.double(), phi.double(), alpha, bias, n=4)
    for one, other in zip((pre, post, res), exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    out = reference.apply_post_res(x, reference.apply_pre(x, pre), post, res)
    assert out.dtype == dtype


def test_autocast_does_not_reach_the_coefficients():
    x, phi, alpha, bias = draw(6, 4, 16, dtype=torch.float32)
    plain = reference.coefficients(x, phi, alpha, bias, n=4)
    f = reference.apply_pre(x, plain[0])
    merged = reference.apply_post_res(x, f, plain[1], plain[2])
    with torch.autocast("cpu", torch.bfloat16):
        cast = reference.coefficients(x, phi, alpha, bias, n=4)
        assert torch.equal(reference.apply_pre(x, plain[0]), f)
        assert torch.equal(reference.apply_post_res(x, f, plain[1], plain[2]), merged)
    for one, other in zip(plain, cast, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("convention", ALL, ids=named)
def test_zero_token_has_finite_values_and_gradients(convention):
    x, phi, alpha, bias = draw(7, 4, 8, dtype=torch.float32)
    x[1] = 0
    leaves = [t.requires_grad_() for t in (x, phi, alpha, bias)]
    outs = reference.coefficients(*leaves, n=4, convention=convention)
    torch.testing.assert_close(
        outs[0][1].detach(), torch.sigmoid(bias[:4].detach()) + convention.pre_eps
    )
    sum((out * (k + 1)).square().sum() for k, out in enumerate(outs)).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert x.grad[1].abs().max() > 0


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_zero_token_without_eps_gives_the_biases(place):
    convention = Convention("bare", norm_eps=0.0, norm_eps_place=place)
    x, phi, alpha, bias = draw(8, 2, 3, dtype=torch.float32)
    x[0] = 0
    x.requires_grad_()
    pre, _, _ = reference.coefficients(x, phi, alpha, bias, n=2, convention=convention)
    torch.testing.assert_close(pre[0].detach(), torch.sigmoid(bias[:2]))
    pre.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 3e4), (torch.bfloat16, 1e30), (torch.float32, 1e35), (torch.float64, 1e200)],
    ids=str,
)
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_norm_divisor_does_not_overflow(dtype, size, place):
    g = torch.Generator().manual_seed(9)
    x = (torch.randn(3, 4, 40, generator=g).double().clamp(-2, 2) * size).to(dtype)
    x[1] /= size
    x.requires_grad_()
    got = reference.norm_divisor(x, 0.5, place=place)  # nothing beside a row of such a size
    flat = x.detach().double().flatten(-2)
    peak = flat.abs().amax(-1)
    expected = peak * (flat / peak[:, None]).square().mean(-1).sqrt()
    huge = [0, 2]
    torch.testing.assert_close(got[huge].double(), expected[huge], rtol=1e-4, atol=0)
    small = (expected[1].square() + 0.5).sqrt() if place == "inside" else expected[1] + 0.5
    torch.testing.assert_close(got[1].double(), small, rtol=1e-5, atol=0)
    got[huge].sum().backward()
    slope = flat / expected[:, None] / flat.shape[-1]
    grad = x.grad.double().flatten(-2)
    torch.testing.assert_close(grad[huge], slope[huge], rtol=1e-2, atol=1e-4)


def test_norm_divisor_places_eps_where_it_is_told():
    x = torch.full((2, 2), 3.0, dtype=torch.float64)
    assert reference.norm_divisor(x, 16.0).item() == 5.0
    assert reference.norm_divisor(x, 16.0, place="outside").item() == 19.0
    assert reference.norm_divisor(0 * x, 16.0).item() == 4.0
    assert reference.norm_divisor(0 * x, 16.0, place="outside").item() == 16.0
    for place in ("inside", "outside"):
        assert reference.norm_divisor(0 * x, 0.0, place=place).item() == 1.0


@pytest.mark.parametrize("convention", ALL, ids=named)
def test_nan_stays_in_its_token(convention):
    x, phi, alpha, bias = draw(10, 4, 6, dtype=torch.float32)
    dirty = x.clone()
    dirty[1, 2, 3] = float("nan")
    grads, outs = [], []
    for streams in (x, dirty):
        leaf = streams.requires_grad_()
        pre, post, res = reference.coefficients(leaf, phi, alpha, bias, n=4, convention=convention)
        out = reference.apply_post_res(leaf, reference.apply_pre(leaf, pre), post, res)
        out.square().sum().backward()
        outs.append(out)
        grads.append(leaf.grad)
    assert outs[1][1].isnan().all()
    for one, other in (outs, grads):
        torch.testing.assert_close(one[[0, 2]], other[[0, 2]])


def test_strides_do_not_matter():
    wide, phi, alpha, bias = draw(11, 4, 12, tokens=(2, 6))
    x = wide[:, ::2].transpose(0, 1)
    assert not x.is_contiguous()
    for one, other in zip(
        reference.coefficients(x, phi, alpha, bias, n=4),
        reference.coefficients(x.contiguous(), phi.T.contiguous().T, alpha, bias, n=4),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tokens", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_any_leading_dimensions(tokens):
    x, phi, alpha, bias = draw(12, 3, 4, tokens=tokens)
    pre, post, res = reference.coefficients(x, phi, alpha, bias, n=3)
    assert (pre.shape, post.shape, res.shape) == ((*tokens, 3), (*tokens, 3), (*tokens, 3, 3))
    h = reference.apply_pre(x, pre)
    assert h.shape == (*tokens, 4)
    assert reference.apply_post_res(x, h, post, res).shape == (*tokens, 3, 4)


def test_one_stream_mixes_by_one():
    x, phi, alpha, bias = draw(13, 1, 8)
    _, _, res = reference.coefficients(x, phi, alpha, bias, n=1)
    assert torch.equal(res, torch.ones(3, 1, 1, dtype=torch.float64))


def test_sixteen_streams():
    x, phi, alpha, bias = draw(14, 16, 3)
    _, _, res = reference.coefficients(x, phi, alpha, bias, n=16)
    torch.testing.assert_close(res.sum(-1), torch.ones(3, 16, dtype=torch.float64))


def test_compiles_without_graph_breaks():
    x, phi, alpha, bias = draw(15, 4, 8, dtype=torch.float32)

    def step(x):
        pre, post, res = reference.coefficients(x, phi, alpha, bias, n=4, iters=3)
        return reference.apply_post_res(x, reference.apply_pre(x, pre), post, res)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outs = [function(leaf) for function, leaf in zip((step, compiled), leaves, strict=True)]
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("n", SIZES)
def test_hyper_connections_equal_the_formulae(n):
    channels, eps = 7, 1e-5
    x, _, alpha, bias = draw(n + 20, n, channels)
    g = torch.Generator().manual_seed(n)
    phi = torch.randn(channels, n + 2, generator=g).double()
    got = reference.hc_coefficients(x, phi, alpha, bias, n=n, eps=eps)
    theta, beta = phi.numpy(), bias.numpy()
    for token in range(x.shape[0]):
        streams = x[token].numpy()
        normed = [row / math.sqrt(float(np.mean(row**2)) + eps) for row in streams]
        for i in range(n):
            pre = float(alpha[0]) * math.tanh(theta[:, 0] @ normed[i]) + beta[i]
            post = float(alpha[1]) * math.tanh(theta[:, 1] @ normed[i]) + beta[n + i]
            assert got[0][token, i].item() == pytest.approx(pre, rel=1e-12)
            assert got[1][token, i].item() == pytest.approx(post, rel=1e-12)
            for j in range(n):
                res = math.tanh(theta[:, 2 + i] @ normed[j])
                res = float(alpha[2]) * res + beta[2 * n + i * n + j]
                assert got[2][token, i, j].item() == pytest.approx(res, rel=1e-12)


def test_expand_copies():
    for n in (1, 3):
        x = torch.randn(2, 5, generator=torch.Generator().manual_seed(n))
        streams = reference.expand_streams(x, n)
        assert streams.shape == (2, n, 5)
        assert all(torch.equal(streams[:, i], x) for i in range(n))
        streams[0, 0] = 7.0
        assert not (x == 7.0).any()
        assert n == 1 or not (streams[:, 1] == 7.0).any()


def test_collapse_modes():
    x, _, _, _ = draw(16, 3, 5)
    weight = torch.tensor([0.5, -1.0, 2.0])
    torch.testing.assert_close(reference.collapse_streams(x), x.mean(-2))
    torch.testing.assert_close(reference.collapse_streams(x, mode="mean"), x.mean(-2))
    torch.testing.assert_close(reference.collapse_streams(x, mode="sum"), x.sum(-2))
    learned = 0.5 * x[:, 0] - x[:, 1] + 2 * x[:, 2]
    torch.testing.assert_close(reference.collapse_streams(x, weight), learned)
    torch.testing.assert_close(reference.collapse_streams(x, weight, "learned"), learned)
    each = weight.expand(3, 3) * torch.tensor([[1.0], [2.0], [3.0]])
    torch.testing.assert_close(
        reference.collapse_streams(x, each), learned * torch.tensor([[1.0], [2.0], [3.0]])
    )
    low = x.to(torch.bfloat16)
    assert reference.collapse_streams(low, mode="sum").dtype == torch.bfloat16


def call(**changes):
    x, phi, alpha, bias = draw(17, 2, 3, dtype=torch.float32)
    args = {"x": x, "phi": phi, "alpha": alpha, "bias": bias, "n": 2} | changes
    return reference.coefficients(**args)


def post_res(**changes):
    args = {
        "x": torch.zeros(5, 2, 3),
        "f": torch.zeros(5, 3),
        "post": torch.zeros(5, 2),
        "res": torch.zeros(5, 2, 2),
    } | changes
    return reference.apply_post_res(**args)


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (lambda: call(n=3), ["x", "[..., n=3, C]", "[3, 2, 3]"]),
        (lambda: call(n=0), ["n must", "at least 1", "0"]),
        (lambda: call(n=2.0), ["n must", "integer", "2.0"]),
        (lambda: call(x=torch.zeros(3)), ["x", "[..., n=2, C]", "[3]"]),
        (lambda: call(x=torch.zeros(2, 3, dtype=torch.int32)), ["x", "floating", "int32"]),
        (lambda: call(phi=torch.zeros(5, 8)), ["phi", "[6, K]", "[5, 8]"]),
        (lambda: call(phi=torch.zeros(6, 7)), ["phi", "n*n + 2*n = 8", "7"]),
        (lambda: call(phi=torch.zeros(8, 6).long()), ["phi", "floating", "int64"]),
        (lambda: call(alpha=torch.zeros(2)), ["alpha", "[3]", "[2]"]),
        (lambda: call(bias=torch.zeros(9)), ["bias", "[n*n + 2*n] = [8]", "[9]"]),
        (lambda: call(iters=0), ["iters", "at least 1"]),
        (lambda: call(eps=-1.0), ["eps", "at least 0", "-1.0"]),
        (lambda: post_res(f=torch.zeros(5, 4)), ["f must", "[5, 3]", "[5, 4]"]),
        (lambda: post_res(post=torch.zeros(5, 3)), ["post", "[5, 2]", "[5, 3]"]),
        (lambda: post_res(res=torch.zeros(2, 2)), ["res", "[5, 2, 2]", "[2, 2]"]),
        (lambda: reference.apply_pre(torch.zeros(5, 2, 3), torch.zeros(2)), ["pre", "[5, 2]"]),
        (lambda: reference.norm_divisor(torch.zeros(2, 3), place="in"), ["place", "'inside'"]),
        (lambda: reference.expand_streams(torch.zeros(3), 0), ["n must", "0"]),
        (lambda: reference.collapse_streams(torch.zeros(2, 3), mode="max"), ["'sum'", "'max'"]),
        (
            lambda: reference.collapse_streams(torch.zeros(2, 3), mode="learned"),
            ["weight", "missing"],
        ),
        (
            lambda: reference.collapse_streams(torch.zeros(2, 3), torch.ones(2), "sum"),
            ["weight", "given", "'sum'"],
        ),
        (lambda: reference.collapse_streams(torch.zeros(2, 3), torch.ones(3)), ["weight", "[3]"]),
        (
            lambda: reference.hc_coefficients(
                torch.zeros(2, 3), torch.zeros(6, 8), torch.zeros(3), torch.zeros(8), n=2
            ),
            ["phi", "[C, n + 2] = [3, 4]", "[6, 8]"],
        ),
        (
            lambda: reference.head_weights(
                torch.zeros(2, 3), torch.zeros(6, 2), torch.zeros(3), torch.zeros(2)
            ),
            ["alpha", "one element", "[3]"],
        ),
    ],
    ids=[
        "n-x", "n-zero", "n-float", "x-vector", "x-integer", "phi-rows", "phi-columns",
        "phi-integer", "alpha", "bias", "iters", "eps", "f", "post", "res", "pre", "place",
        "expand", "mode", "no-weight", "extra-weight", "weight", "hc-phi", "head-alpha",
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(function, parts):
    with pytest.raises(MHCError) as error:
        function()
    assert [part for part in parts if part not in str(error.value)] == []


def test_an_unknown_convention_is_named():
    with pytest.raises(ConfigError, match="convention must be one of .* did you mean 'liger'"):
        call(convention="ligger")


@pytest.mark.parametrize("module", [reference, sinkhorn], ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
