"""Sinkhorn-Knopp against numpy in float64, against its unrolled twin, and by its invariants."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.conventions import CONVENTIONS
from mhc_compile.errors import ConfigError, MHCError
from mhc_compile.runtime.sinkhorn import sinkhorn_knopp, sinkhorn_knopp_unrolled

RULES = {name: c.sinkhorn_axes() for name, c in CONVENTIONS.items() if name != "tilekernels"}
RULES |= {
    "exp_add": {"order": "row_col", "start": "exp", "eps": 1e-3, "eps_mode": "add"},
    "exp_add_cols": {"order": "col_row", "start": "exp", "eps": 1e-3, "eps_mode": "add"},
    "exp_clamp": {"order": "row_col", "start": "exp", "eps": 1e-6, "eps_mode": "clamp"},
    "exp_clamp_active": {"order": "row_col", "start": "exp", "eps": 0.9, "eps_mode": "clamp"},
    "softmax_clamp": {"order": "col_row", "start": "softmax", "eps": 0.8, "eps_mode": "clamp"},
    "softmax_extra_step": {"order": "col_row", "start": "softmax"},
    "softmax_first_step": {"order": "row_col", "start": "softmax", "start_is_step": True},
}
EPS_FREE = {name: rule for name, rule in RULES.items() if rule.get("eps_mode", "none") == "none"}
SIZES = [1, 2, 3, 4, 8, 16]


def logits_of(seed, *shape, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def oracle(logits, iters, order, start="exp", start_is_step=False, eps=0.0, eps_mode="none"):
    """One matrix, in numpy float64, in the log domain as long as there is no eps."""

    def lse(a, axis):
        top = a.max(axis=axis, keepdims=True)
        return top + np.log(np.exp(a - top).sum(axis=axis, keepdims=True))

    axes = [{"col": 0, "row": 1}[name] for name in order.split("_")] * iters
    log_m = logits.astype(np.float64)
    if start == "softmax":
        log_m = log_m - lse(log_m, 1)
        if start_is_step:
            axes = axes[1:]
    if eps_mode == "none":
        for axis in axes:
            log_m = log_m - lse(log_m, axis)
        return np.exp(log_m)
    m = np.exp(log_m if start == "softmax" else log_m - log_m.max(axis=axes[0], keepdims=True))
    if start == "softmax" and eps_mode == "add":
        m = m + eps
    for axis in axes:
        total = m.sum(axis=axis, keepdims=True)
        m = m / (total + eps if eps_mode == "add" else np.maximum(total, eps))
    return m


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("iters", [1, 2, 20])
def test_values_equal_the_oracle(rule, n, iters):
    logits = logits_of(100 * n + iters, 3, n, n)
    expected = np.stack([oracle(each.numpy(), iters, **RULES[rule]) for each in logits])
    got = sinkhorn_knopp(logits, iters, **RULES[rule])
    unrolled = sinkhorn_knopp_unrolled(logits, iters, **RULES[rule])
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(unrolled.numpy(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_gradient_equals_autograd_through_the_loop(rule, n):
    logits = logits_of(n, 5, n, n)
    weight = logits_of(n + 50, 5, n, n)
    grads = []
    for function in (sinkhorn_knopp, sinkhorn_knopp_unrolled):
        leaf = logits.clone().requires_grad_()
        (function(leaf, 20, **RULES[rule]) * weight).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)
    if n > 1:
        assert grads[1].abs().max() > 1e-4


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_gradient_equals_finite_differences(rule, n):
    logits = logits_of(7 * n, 1 if n > 4 else 2, n, n, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: sinkhorn_knopp(z, 4, **RULES[rule]), (logits,), fast_mode=n > 4
    )


@pytest.mark.parametrize("rule", ["paper", "deepseek_v4", "exp_clamp"])
def test_second_derivative_equals_finite_differences(rule):
    logits = logits_of(3, 2, 3, 3, scale=1.0).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: sinkhorn_knopp(z, 3, **RULES[rule]), (logits,))


@pytest.mark.parametrize("iters", [20, 60, 100])
@pytest.mark.parametrize("n", [3, 5, 16])
@pytest.mark.parametrize("low", [-95.0, -200.0])
def test_elements_that_underflow_can_grow_back(n, iters, low):
    # All rows but the last need column 0 and all columns but the first need the last row, so the
    # other elements grow (n - 1)**2-fold an iteration and in time decide the result.
    logits = torch.full((n, n), low)
    logits[:, 0] = logits_of(n, n, dtype=torch.float32, scale=0.5)
    logits[-1] = logits_of(n + 1, n, dtype=torch.float32, scale=0.5)
    weight = logits_of(n + 2, n, n, dtype=torch.float32)
    leaf = logits.clone().requires_grad_()
    out = sinkhorn_knopp(leaf, iters)
    (out * weight).sum().backward()
    np.testing.assert_allclose(
        out.detach().numpy(), oracle(logits.numpy(), iters, "col_row"), rtol=1e-4, atol=1e-5
    )
    exact = logits.double().requires_grad_()
    (sinkhorn_knopp_unrolled(exact, iters) * weight).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from(SIZES),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.01, 1.0, 3.0, 30.0]),
    name=st.sampled_from(sorted(EPS_FREE)),
)
def test_result_is_doubly_stochastic(n, seed, scale, name):
    rule = EPS_FREE[name]
    last, other = (-1, -2) if rule["order"].endswith("row") else (-2, -1)
    m = sinkhorn_knopp(logits_of(seed, 3, n, n, dtype=torch.float32, scale=scale), 20, **rule)
    assert (m >= 0).all()
    torch.testing.assert_close(m.sum(last), torch.ones(3, n), rtol=0, atol=2e-6)
    # The axis that was not last carries the truncation error, small where logits are tame; normal
    # ones of scale 1 leave 3e-4 in exact arithmetic now and then (n = 2, seed 5605011).
    torch.testing.assert_close(
        m.sum(other), torch.ones(3, n), rtol=0, atol=1e-4 if scale < 1 else n - 1 + 1e-5
    )


@settings(max_examples=25, deadline=None)
@given(n=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 2**31))
def test_moving_a_whole_row_does_nothing_after_a_row_step(n, seed):
    logits = logits_of(seed, n, n, dtype=torch.float64)
    shift = logits_of(seed + 1, n, 1, dtype=torch.float64, scale=5.0)
    rule = RULES["transformer_engine"]
    torch.testing.assert_close(
        sinkhorn_knopp(logits + shift, 3, **rule), sinkhorn_knopp(logits, 3, **rule)
    )


@settings(max_examples=25, deadline=None)
@given(n=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 2**31))
def test_orders_are_each_others_transpose(n, seed):
    logits = logits_of(seed, n, n)
    torch.testing.assert_close(
        sinkhorn_knopp(logits.mT, 2, order="row_col").mT, sinkhorn_knopp(logits, 2, order="col_row")
    )


def extreme(pattern, n, seed):
    logits = logits_of(seed, n, n, dtype=torch.float32, scale=1.0)
    if pattern == "row_down":
        logits[0] -= 100
    elif pattern == "column_up":
        logits[:, -1] += 100
    elif pattern == "row_down_column_up":
        logits[0] -= 100
        logits[:, 0] += 100
    elif pattern == "diagonal_up":
        logits += 100 * torch.eye(n)
    elif pattern == "all_down":
        logits -= 100
    elif pattern == "cross_up":
        logits[:, 0] += 100
        logits[-1] += 100
    elif pattern == "one_column_only":
        logits[:, 1:] -= 100
    elif pattern == "signs":
        logits = 100 * torch.sign(logits)
    return logits


PATTERNS = [
    "row_down", "column_up", "row_down_column_up", "diagonal_up", "all_down", "cross_up",
    "one_column_only", "signs",
]  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 4, 6, 16])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rule", EPS_FREE)
def test_extreme_logits_give_right_values_and_gradients(rule, pattern, n):
    axes = EPS_FREE[rule]
    logits = extreme(pattern, n, seed=11 * n)
    weight = logits_of(n, n, n, dtype=torch.float32)
    leaf = logits.clone().requires_grad_()
    out = sinkhorn_knopp(leaf, 20, **axes)
    (out * weight).sum().backward()
    np.testing.assert_allclose(
        out.detach().numpy(), oracle(logits.numpy(), 20, **axes), rtol=2e-4, atol=2e-5
    )
    exact = logits.double().requires_grad_()
    (sinkhorn_knopp_unrolled(exact, 20, **axes) * weight).sum().backward()
    assert leaf.grad.isfinite().all()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rule", ["deepseek_v4", "liger"])
def test_extreme_logits_stay_finite_with_eps(rule, pattern):
    leaf = extreme(pattern, 4, seed=5).requires_grad_()
    weight = logits_of(6, 4, 4, dtype=torch.float32)
    out = sinkhorn_knopp(leaf, 20, **RULES[rule])
    (out * weight).sum().backward()
    expected = oracle(leaf.detach().numpy(), 20, **RULES[rule])
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_nan_stays_in_its_matrix(rule):
    logits = logits_of(1, 4, 3, 3, dtype=torch.float32)
    clean = logits.clone().requires_grad_()
    logits[2, 1, 1] = float("nan")
    dirty = logits.requires_grad_()
    outs = [sinkhorn_knopp(each, 5, **RULES[rule]) for each in (clean, dirty)]
    for out in outs:
        out.square().sum().backward()
    others = [0, 1, 3]
    assert outs[1][2].isnan().any()
    assert torch.equal(outs[0][others], outs[1][others])
    assert torch.equal(clean.grad[others], dirty.grad[others])


@pytest.mark.parametrize("rule", ["paper", "deepseek_v4"])
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 3, 3), (3, 3), (2, 1, 3, 2, 2)], ids=str)
def test_any_batch_shape(rule, shape):
    logits = logits_of(2, *shape).requires_grad_()
    out = sinkhorn_knopp(logits, 3, **RULES[rule])
    assert out.shape == shape
    assert out.is_contiguous()
    torch.testing.assert_close(out, sinkhorn_knopp_unrolled(logits, 3, **RULES[rule]))
    out.sum().backward()
    assert logits.grad.shape == shape


def test_strides_do_not_matter():
    wide = logits_of(3, 5, 8, 4)
    views = [wide[:, ::2], wide[:, ::2].mT, wide[:, :4].expand(2, 5, 4, 4), wide[::2, 4:]]
    for view in views:
        leaf = view.clone(memory_format=torch.contiguous_format).requires_grad_()
        strided = view.detach().requires_grad_()
        results = [sinkhorn_knopp(each, 3) for each in (leaf, strided)]
        assert torch.equal(results[0], results[1])
        for result in results:
            result.square().sum().backward()
        assert torch.equal(leaf.grad, strided.grad)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes(dtype, result):
    logits = logits_of(4, 6, 4, 4, dtype=dtype).requires_grad_()
    out = sinkhorn_knopp(logits, 20)
    assert out.dtype == result
    torch.testing.assert_close(out.sum(-1), torch.ones(6, 4, dtype=result), rtol=0, atol=1e-6)
    out.square().sum().backward()
    assert logits.grad.dtype == dtype


def test_only_the_logits_are_saved():
    logits = logits_of(5, 64, 4, 4, dtype=torch.float32).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sinkhorn_knopp(logits, 20)
    assert [tensor.data_ptr() for tensor in saved] == [logits.data_ptr()]


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("rule", ["paper", "deepseek_v4"])
def test_compiles_without_graph_breaks(rule, dynamic):
    def loss(z):
        return sinkhorn_knopp(z, 4, **RULES[rule]).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager_leaf = logits_of(6, 7, 3, 3, dtype=torch.float32).requires_grad_()
    leaf = eager_leaf.detach().clone().requires_grad_()
    loss(eager_leaf).backward()
    compiled(leaf).backward()
    torch.testing.assert_close(leaf.grad, eager_leaf.grad)


@pytest.mark.parametrize(
    ("logits", "kwargs", "parts"),
    [
        (torch.zeros(2, 3), {}, ["logits", "[2, 3]", "square"]),
        (torch.zeros(3), {}, ["logits", "[3]", "[..., n, n]"]),
        (torch.zeros(4, 0, 0), {}, ["logits", "n >= 1", "[4, 0, 0]"]),
        (torch.zeros(2, 2, dtype=torch.long), {}, ["logits", "floating", "torch.int64"]),
        (torch.zeros(2, 2), {"iters": 0}, ["iters", "at least 1", "0"]),
        (torch.zeros(2, 2), {"iters": -3}, ["iters", "-3"]),
        (torch.zeros(2, 2), {"iters": 2.5}, ["iters", "integer", "2.5"]),
    ],
    ids=["oblong", "vector", "empty", "integer", "iters0", "iters-3", "iters2.5"],
)
@pytest.mark.parametrize("function", [sinkhorn_knopp, sinkhorn_knopp_unrolled])
def test_wrong_arguments_are_named(function, logits, kwargs, parts):
    with pytest.raises(MHCError) as error:
        function(logits, **kwargs)
    assert [part for part in parts if part not in str(error.value)] == []


def test_contradictory_axes_are_refused():
    with pytest.raises(ConfigError, match="sinkhorn_order must be one of 'col_row', 'row_col'"):
        sinkhorn_knopp(torch.zeros(2, 2), order="both")
    with pytest.raises(ConfigError, match="contradicts"):
        sinkhorn_knopp(torch.zeros(2, 2), eps=1e-6)
