"""The operators `torch.ops.mhc.*`: equal to the reference, opaque to torch.compile."""

import contextlib
import dataclasses
import time
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._inductor import config, graph, lowering

import mhc_compile as mc
from mhc_compile.conventions import CONVENTIONS, Convention, get_convention
from mhc_compile.errors import ConfigError, MHCError
from mhc_compile.runtime import fused, fused_steps, ops, reference, streams

F64, F32 = torch.float64, torch.float32
PAPER = get_convention("paper").key()
OWN = {
    "outside": Convention("o", norm_eps=0.1, norm_eps_place="outside"),
    "clamp": Convention(
        "c", sinkhorn_eps=0.3, sinkhorn_eps_mode="clamp", sinkhorn_iters=4, res_transposed=True
    ),
    "add": Convention(
        "a", sinkhorn_start="softmax", sinkhorn_eps=0.1, sinkhorn_eps_mode="add", pre_eps=0.1
    ),
    "no eps": Convention("n", norm_eps=0.0, sinkhorn_start="softmax"),
}
RULES = {**CONVENTIONS, **OWN}
op = torch.ops.mhc


def parts(lead=(2, 3), n=4, channels=5, dtype=F64, scale=1.0):
    """Streams, sublayer output and parameters, all leaves."""
    columns = n * n + 2 * n
    shapes = {
        "x": (*lead, n, channels),
        "f": (*lead, channels),
        "phi": (n * channels, columns),
        "alpha": (3,),
        "bias": (columns,),
    }
    made = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    made["phi"] *= scale * (n * channels) ** -0.5
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def by_reference(p, rule):
    x = p["x"]
    pre, post, res = reference.coefficients(
        x, p["phi"], p["alpha"], p["bias"], n=x.shape[-2], convention=rule
    )
    h = reference.apply_pre(x, pre)
    return h, pre, post, res, reference.apply_post_res(x, p["f"], post, res)


def by_ops(p, rule):
    key = rule.key()
    h, pre, post, res, _, _ = op.read(p["x"], p["phi"], p["alpha"], p["bias"], key)
    return h, pre, post, res, op.post_res(p["x"], p["f"], post, res)


def gradients(outputs, inputs, seed=0):
    """Gradients of a fixed random functional of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(
        (out * torch.randn(out.shape, generator=generator, dtype=F64).to(out.dtype)).sum()
        for out in outputs
    )
    return torch.autograd.grad(total, inputs)


def assert_equal(got, expected, dtype, names=None):
    bound = 1e-12 if dtype == F64 else 1e-5
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        size = max(1.0, float(b.detach().nan_to_num().abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(
            a, b, rtol=bound, atol=bound * size, msg=lambda m, k=k: f"{names or k}: {m}"
        )


def check(p, rule, dtype):
    inputs = list(p.values())
    got, expected = by_ops(p, rule), by_reference(p, rule)
    assert_equal(got, expected, dtype)
    assert_equal(gradients(got, inputs), gradients(expected, inputs), dtype, list(p))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rule", RULES)
def test_read_and_post_res_equal_the_reference(rule, n, dtype):
    check(parts(n=n, dtype=dtype), RULES[rule], dtype)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0, 3), (7,), (2, 1, 3)], ids=str)
def test_any_leading_dimensions(lead):
    check(parts(lead, n=3), RULES["paper"], F64)
    check(parts(lead, n=2), RULES["deepseek_v4"], F64)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 6), st.sampled_from(sorted(RULES)))
def test_any_sizes(n, channels, tokens, rule):
    check(parts((tokens,), n=n, channels=channels), RULES[rule], F64)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "stream last"])
def test_strided_streams(layout):
    p = parts((4, 3), n=4, channels=5)
    whole = {
        "transposed": lambda: torch.randn(3, 4, 4, 5, dtype=F64).transpose(0, 1),
        "expanded": lambda: torch.randn(4, 3, 1, 5, dtype=F64).expand(4, 3, 4, 5),
        "sliced": lambda: torch.randn(8, 3, 4, 11, dtype=F64)[::2, :, :, 1::2],
        "stream last": lambda: torch.randn(4, 3, 5, 4, dtype=F64).mT,
    }[layout]()
    assert layout == "expanded" or not whole.is_contiguous()
    p["x"] = whole.requires_grad_()
    p["f"] = torch.randn(4, 5, 3, dtype=F64).mT.requires_grad_()
    check(p, RULES["paper"], F64)


@pytest.mark.parametrize("rule", ["paper", "deepseek_v4", "transformer_engine"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_extreme_logits(rule, dtype):
    p = parts((8,), n=4, dtype=dtype)
    with torch.no_grad():
        p["bias"].copy_(200 * torch.randint(-1, 2, (24,)))
    got = by_ops(p, RULES[rule])
    grads = gradients(got, list(p.values()))
    assert all(t.isfinite().all() for t in (*got, *grads))
    check(p, RULES[rule], dtype)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e15, 1e25])
def test_streams_of_any_size(size):
    p = parts((3,), n=2, dtype=F32)
    with torch.no_grad():
        p["x"][1] *= size
        p["x"][2] = 0
    got, expected = by_ops(p, RULES["liger"]), by_reference(p, RULES["liger"])
    for a, b in zip(got[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    (grad,) = gradients(got[1:4], [p["x"]])
    (right,) = gradients(expected[1:4], [p["x"]])
    torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5 * float(right[0].abs().max()))


def test_a_nan_stays_in_its_token():
    p = parts((6,), n=4)
    clean = by_ops(p, RULES["paper"])
    weights = [torch.randn_like(out) for out in clean]
    p["x"].data[2, 1, 3] = float("nan")
    dirty = by_ops(p, RULES["paper"])
    others = torch.arange(6) != 2
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a[others], b[others]) and a[2].isnan().any()
    loss = sum((w * out).sum() for w, out in zip(weights, dirty, strict=True))
    g_x, g_f = torch.autograd.grad(loss, [p["x"], p["f"]])
    assert g_x[others].isfinite().all() and g_f[others].isfinite().all() and g_x[2].isnan().any()


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_streams_are_computed_in_float32(dtype, n, monkeypatch):
    monkeypatch.setitem(fused_steps.BLOCK_ELEMENTS, "cpu", 2 * n * 5)  # several blocks
    p = parts((7,), n=n, dtype=F32)
    for name in ("x", "f"):
        p[name] = p[name].detach().to(dtype).requires_grad_()
    got, expected = by_ops(p, RULES["paper"]), by_reference(p, RULES["paper"])
    assert_equal(got[1:4], expected[1:4], F32)
    unit = torch.finfo(dtype).eps
    for a, b in [(got[0], expected[0]), (got[4], expected[4])]:
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=unit, atol=unit)
    for a, b in zip(
        gradients(got, list(p.values())), gradients(expected, list(p.values())), strict=True
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=4 * unit, atol=8 * unit)


@pytest.mark.parametrize("elements", [1, 10, 16])
def test_blocks_do_not_show(elements, monkeypatch):
    p = parts((7,), n=4)
    everything = by_ops(p, RULES["paper"])
    whole = gradients(everything, list(p.values()))
    monkeypatch.setitem(fused_steps.BLOCK_ELEMENTS, "cpu", elements)
    blocks = by_ops(p, RULES["paper"])
    assert_equal(blocks, everything, F64)
    assert_equal(gradients(blocks, list(p.values())), whole, F64)


NORMS = {
    "none": lambda h, w, b: h,
    "rms": lambda h, w, b: h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-3) * w,
    "layer": lambda h, w, b: torch.nn.functional.layer_norm(h, h.shape[-1:], w, b, 1e-3),
}


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_seam_is_its_three_steps(norm, affine, dtype):
    p = parts((5,), n=3, dtype=dtype)
    post = torch.rand(5, 3, dtype=dtype, requires_grad=True)
    res = torch.rand(5, 3, 3, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, dtype=dtype, requires_grad=True) if affine else None
    shift = torch.randn(5, dtype=dtype, requires_grad=True) if affine and norm == "layer" else None
    projection = (p["phi"], p["alpha"], p["bias"])
    y, h, pre, post_next, res_next, proj, square = op.seam(
        p["x"], p["f"], post, res, *projection, weight, shift, norm, 1e-3, PAPER
    )
    right_y = reference.apply_post_res(p["x"], p["f"], post, res)
    gates = reference.coefficients(right_y, *projection, n=3)
    one = torch.ones((), dtype=dtype)
    w, b = weight if affine else one, shift
    mixed = reference.apply_pre(right_y, gates[0])
    if norm == "layer" and not affine:
        w = None
    right = (right_y, NORMS[norm](mixed, w, b), *gates)
    got = (y, h, pre, post_next, res_next)
    assert_equal(got, right, dtype)
    assert_equal(
        (proj.t(), square),
        (right_y.flatten(1) @ p["phi"], right_y.flatten(1).square().sum(1)),
        dtype,
    )
    assert not proj.requires_grad and not square.requires_grad
    inputs = [*p.values(), post, res]
    inputs += [t for t in (weight, shift) if t is not None and norm != "none"]
    assert_equal(gradients(got, inputs), gradients(right, inputs), dtype)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1), (2,), (3, 4)], ids=str)
def test_outputs_that_nobody_uses_cost_no_gradient(used):
    p = parts((5,), n=3)
    gates = torch.rand(5, 3, dtype=F64), torch.rand(5, 3, 3, dtype=F64)
    projection = (p["phi"], p["alpha"], p["bias"])
    weight = torch.ones(5, dtype=F64, requires_grad=True)
    got = op.seam(p["x"], p["f"], *gates, *projection, weight, None, "rms", 1e-3, PAPER)
    y = reference.apply_post_res(p["x"], p["f"], *gates)
    maps = reference.coefficients(y, *projection, n=3)
    right = (y, NORMS["rms"](reference.apply_pre(y, maps[0]), weight, None), *maps)
    inputs = [*p.values(), weight]
    for a, b in zip(
        torch.autograd.grad(sum(got[k].square().sum() for k in used), inputs, allow_unused=True),
        torch.autograd.grad(sum(right[k].square().sum() for k in used), inputs, allow_unused=True),
        strict=True,
    ):
        b = torch.zeros(()) if b is None else b
        torch.testing.assert_close(
            torch.zeros_like(b) if a is None else a,
            b.expand_as(b) if a is None else b.expand_as(a).to(a.dtype),
        )  # noqa: E501


@pytest.mark.parametrize("frozen", ["phi", "x", "all but x"])
def test_frozen_inputs_get_no_gradient(frozen):
    p = parts((5,), n=3)
    names = ("phi", "alpha", "bias", "f") if frozen == "all but x" else (frozen,)
    for name in names:
        p[name].requires_grad_(False)
    inputs = [t for t in p.values() if t.requires_grad]
    got, expected = by_ops(p, RULES["paper"]), by_reference(p, RULES["paper"])
    assert_equal(gradients(got, inputs), gradients(expected, inputs), F64)


def test_the_gradient_of_a_frozen_phi_is_not_computed():
    p = {name: t.detach() for name, t in parts((5,), n=3).items()}
    gates = op.coefficients(p["x"], p["phi"], p["alpha"], p["bias"], PAPER)
    back = op.coefficients_backward(
        *gates[:3], p["x"], p["phi"], p["alpha"], p["bias"], *gates[3:], PAPER, False
    )
    assert back[1].shape == (0,)
    full = op.coefficients_backward(
        *gates[:3], p["x"], p["phi"], p["alpha"], p["bias"], *gates[3:], PAPER
    )
    assert full[1].shape == p["phi"].shape and torch.equal(full[0], back[0])


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_expand_and_collapse(n, dtype):
    x = torch.randn(2, 3, 5).to(dtype).requires_grad_()
    weight = torch.randn(n, requires_grad=True)
    each = torch.rand(2, 3, n, requires_grad=True)
    results = []
    for module in (streams, reference):
        wide = module.expand_streams(x, n)
        outs = (
            wide,
            module.collapse_streams(wide, weight),
            module.collapse_streams(wide, each),
            module.collapse_streams(wide, mode="sum"),
            module.collapse_streams(wide),
        )
        results.append((outs, gradients(outs, [x, weight, each])))
    bound = 1e-5 if dtype != torch.bfloat16 else 2e-2
    for a, b in zip(
        (*results[0][0], *results[0][1]), (*results[1][0], *results[1][1]), strict=True
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
    assert results[0][0][0].is_contiguous()
    assert results[0][0][0].data_ptr() != x.data_ptr()


def sample_inputs(n=3, dtype=F64):
    """Arguments of each forward operator; tensors that require gradients come as leaves."""
    p = parts((2, 2), n=n, channels=3, dtype=dtype)
    projection = (p["phi"], p["alpha"], p["bias"])
    post = torch.rand(2, 2, n, dtype=dtype, requires_grad=True)
    res = torch.rand(2, 2, n, n, dtype=dtype, requires_grad=True)
    weight, shift = (torch.randn(3, dtype=dtype, requires_grad=True) for _ in range(2))
    merge = (p["x"], p["f"], post, res)
    proj = torch.randn(n * n + 2 * n, 4, dtype=dtype, requires_grad=True)
    square = torch.rand(4, dtype=dtype, requires_grad=True)
    return {
        "maps": (proj, square, p["alpha"], p["bias"], 3 * n, PAPER),
        "coefficients": (p["x"], *projection, PAPER),
        "pre": (p["x"], post),
        "post_res": merge,
        "read": (p["x"], *projection, RULES["deepseek_v4"].key()),
        "seam": (*merge, *projection, weight, shift, "layer", 1e-3, PAPER),
        "expand": (p["f"], 3),
        "collapse": (p["x"], torch.rand(n, dtype=dtype, requires_grad=True)),
    }


def differentiable(name, out):
    """What has a gradient: proj and square are kept for the backward alone."""
    return out[:-2] if name in ("coefficients", "read", "seam") else out


@pytest.mark.parametrize("name", sample_inputs())
def test_gradcheck(name):
    args = sample_inputs()[name]
    slots = [k for k, a in enumerate(args) if isinstance(a, torch.Tensor)]

    def call(*tensors):
        filled = list(args)
        for k, tensor in zip(slots, tensors, strict=True):
            filled[k] = tensor
        return differentiable(name, getattr(op, name)(*filled))

    assert torch.autograd.gradcheck(call, [args[k] for k in slots])


@pytest.mark.parametrize("name", sample_inputs())
def test_opcheck(name):
    torch.library.opcheck(getattr(op, name).default, sample_inputs(dtype=F32)[name])


@pytest.mark.parametrize("name", sample_inputs())
def test_opcheck_of_the_backward(name):
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in sample_inputs()[name]]
    out = getattr(op, name)(*args)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    grads = [torch.randn_like(t) for t in differentiable(name, tuple(outs))]
    saved = {
        "coefficients": lambda: (*args[:4], *outs[3:], args[4]),
        "read": lambda: (*args[:4], outs[1], *outs[4:], args[4]),
        "seam": lambda: (*args[:4], outs[0], *args[4:9], outs[2], *outs[5:], *args[9:]),
        "expand": tuple,
    }.get(name, lambda: args)()
    backward = getattr(op, f"{name}_backward").default
    torch.library.opcheck(backward, (*grads, *saved))
    if name in ("read", "seam"):
        torch.library.opcheck(backward, (*[None] * (len(grads) - 1), grads[-1], *saved))
        torch.library.opcheck(backward, (*grads, *saved, False))


@pytest.mark.parametrize("name", sample_inputs())
def test_results_may_be_changed_in_place(name):
    """Results, and slices of them, as models do with the state behind the last sublayer."""
    out = getattr(op, name)(*sample_inputs()[name])
    for tensor in [out] if isinstance(out, torch.Tensor) else differentiable(name, out):
        assert not tensor._is_view()
        rows = torch.relu(tensor).detach()
        part = tensor[..., 0]
        part[...] = 0.0
        tensor.mul_(2.0)
        torch.testing.assert_close(tensor[..., 1:].relu(), 2 * rows[..., 1:])
        assert tensor.requires_grad


def test_every_operator_is_tested_and_has_all_its_parts():
    names = set(sample_inputs())
    assert set(ops.SCHEMAS) - {"pre_norm"} == names | {f"{name}_backward" for name in names}
    assert all(callable(getattr(fused, name)) for name in ops.SCHEMAS)


def test_a_second_derivative_is_refused_with_the_remedy():
    p = parts((2,), n=2)
    h, *_ = op.read(p["x"], p["phi"], p["alpha"], p["bias"], PAPER)
    (g_x,) = torch.autograd.grad(h.square().sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once.*reference"):
        g_x.sum().backward()


def step(x, f, phi, alpha, bias):
    h, _, post, res = streams.read_streams(x, phi, alpha, bias, PAPER)
    return streams.apply_post_res(x, h + f, post, res)


def test_operators_are_nodes_of_both_graphs():
    graphs = {"forward": [], "backward": []}

    def keep(kind):
        def compiler(graph, example_inputs):
            graphs[kind] += [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
            return make_boxed_func(graph.forward)

        return compiler

    p = parts((4,), n=3, dtype=F32)
    compiled = aot_function(step, fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    out = compiled(*p.values())
    out.square().sum().backward()
    assert {n for n in graphs["forward"] if "mhc" in n} == {
        "mhc.read.default",
        "mhc.post_res.default",
    }
    assert {n for n in graphs["backward"] if "mhc" in n} == {
        "mhc.read_backward.default",
        "mhc.post_res_backward.default",
    }
    torch.testing.assert_close(out, step(*p.values()))


def test_a_new_number_of_tokens_compiles_nothing():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, dynamic=True, fullgraph=True)
    for lead in [(2, 9), (2, 7), (3, 11), (4, 6)]:
        p = parts(lead, n=4, dtype=F32)
        got, expected = compiled(*p.values()), step(*p.values())
        torch.testing.assert_close(got, expected)
        assert_equal(
            gradients([got], list(p.values())), gradients([expected], list(p.values())), F32
        )
    assert counter.frame_count == 1


def test_export_and_meta():
    module = mc.HyperConnection(6, mc.MHCConfig(streams=3))

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.connection = module

        def forward(self, x):
            h, state = self.connection.pre(x)
            return self.connection.post(x, torch.tanh(h), state)

    x = torch.randn(4, 3, 6)
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=({0: tokens},))
    names = [str(n.target) for n in program.graph.nodes]
    assert "mhc.read.default" in names and "mhc.post_res.default" in names
    for count in (4, 9):
        x = torch.randn(count, 3, 6)
        torch.testing.assert_close(program.module()(x), Layer()(x))
    assert Layer().to("meta")(torch.empty(5, 3, 6, device="meta")).shape == (5, 3, 6)


def test_autocast_changes_nothing():
    p = parts((6,), n=4, dtype=F32)
    plain = by_ops(p, RULES["paper"])
    right = gradients(plain, list(p.values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = by_ops(p, RULES["paper"])
        grads = gradients(got, list(p.values()))
    for a, b in zip((*got, *grads), (*plain, *right), strict=True):
        assert torch.equal(a, b)
    half = p["f"].detach().bfloat16().requires_grad_()
    merged = op.post_res(p["x"], half, plain[2], plain[3])
    assert merged.dtype == F32
    assert torch.autograd.grad(merged.sum(), half)[0].dtype == torch.bfloat16


def test_kernels_run_where_they_support_the_streams(monkeypatch):
    """A stand-in, because the choice is by device: `is_cuda` is asked of the first tensor."""
    calls = []

    class Kernels:
        @staticmethod
        def supports(first, streams):
            return streams is first and streams.shape[-1] == 5

        @staticmethod
        def pre(x, pre):
            calls.append(tuple(x.shape))
            return x.sum(-2)

    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(ops, "_kernels", lambda: Kernels)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of CPU tensors
    x, pre = torch.randn(2, 3, 5), torch.rand(2, 3)
    torch.testing.assert_close(ops._run("pre", x, pre), reference.apply_pre(x, pre))
    assert calls == []
    assert torch.equal(
        ops._run("pre", x.as_subclass(OnCuda), pre).as_subclass(torch.Tensor), x.sum(-2)
    )
    assert calls == [(2, 3, 5)]
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(
        ops._run("pre", x.as_subclass(OnCuda), pre).as_subclass(torch.Tensor),
        reference.apply_pre(x, pre),
    )
    assert len(calls) == 1


@pytest.mark.parametrize("current", [0, 1])
def test_kernels_run_on_the_device_of_their_tensors(current, monkeypatch):
    """Triton launches on the current one; a model may be on "cuda:1", or on several GPUs."""
    entered = []

    class Kernels:
        @staticmethod
        def supports(first, streams):
            return True

        @staticmethod
        def expand_backward(g_y):
            return g_y.sum(-2)

    class OnSecond(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda:1")

    @contextlib.contextmanager
    def switched(device):
        entered.append(device)
        yield

    monkeypatch.setattr(ops, "_kernels", lambda: Kernels)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(ops, "autocast_off_now", lambda first: contextlib.nullcontext())
    ops._run("expand_backward", torch.randn(2, 3, 5).as_subclass(OnSecond))
    assert entered == [torch.device("cuda:1")] * (current == 0)


def test_the_streams_of_each_operator():
    for name, place in ops._STREAMS_AT.items():
        declared = getattr(torch.ops.mhc, name).default._schema.arguments
        assert declared[place].name == "x"
    assert set(ops.SCHEMAS) - set(ops._STREAMS_AT) == {
        "maps", "maps_backward", "expand", "expand_backward",
    }  # fmt: skip


def arguments(**changes):
    p = {name: t.detach() for name, t in parts((2,), n=3, channels=5, dtype=F32).items()}
    p.update(post=torch.rand(2, 3), res=torch.rand(2, 3, 3))
    return {**p, **{name: change(p[name]) for name, change in changes.items()}}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("phi", lambda t: t.T, ["phi"]),
        ("phi", lambda t: t[:-1], ["phi", "[15, 15]", "[14, 15]", "flatten"]),
        ("phi", lambda t: t.long(), ["phi", "floating", "int64"]),
        ("phi", lambda t: t.to("meta"), ["phi", "device", "cpu", "meta", ".to(x.device)"]),
        ("alpha", lambda t: t[:2], ["alpha", "[3]", "[2]"]),
        ("bias", lambda t: t[:-1], ["bias", "n*n + 2*n", "[15]", "[14]"]),
        ("bias", lambda t: t.to("meta"), ["bias", "device"]),
        ("x", lambda t: t[0, 0], ["x", "[..., n, C]"]),
        ("x", lambda t: t.int(), ["x", "floating", "int32"]),
        ("f", lambda t: t[:1], ["f", "[2, 5]", "[1, 5]"]),
        ("f", lambda t: t.to("meta"), ["f", "device"]),
        ("post", lambda t: t.T, ["post", "[2, 3]", "[3, 2]"]),
        ("post", lambda t: t.bool(), ["post", "floating"]),
        ("res", lambda t: t[..., :2], ["res", "[2, 3, 3]", "[2, 3, 2]"]),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(name, change, words):
    if words == ["phi"]:
        # n = 3 and C = 5 make phi square; a wrong layout shows with other sizes only.
        p = {k: t.detach() for k, t in parts((2,), n=3, channels=4, dtype=F32).items()}
        p["phi"], words = p["phi"].T, ["phi", "[12, 15]", "[15, 12]", "phi.T"]
    else:
        p = arguments(**{name: change})
    with pytest.raises(MHCError) as error:
        if name in ("x", "phi", "alpha", "bias"):
            streams.read_streams(p["x"], p["phi"], p["alpha"], p["bias"], PAPER)
        else:
            streams.apply_post_res(p["x"], p["f"], p["post"], p["res"])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_wrong_rules_and_norms_are_named():
    p = arguments()
    with pytest.raises(ConfigError, match=r"rule must be .*Convention.key\(\).*'paper'"):
        streams.read_streams(p["x"], p["phi"], p["alpha"], p["bias"], "paper")
    with pytest.raises(MHCError, match="norm must be one of 'none', 'rms', 'layer', got 'batch'"):
        op.seam(
            p["x"], p["f"], p["post"], p["res"], p["phi"], p["alpha"], p["bias"],
            None, None, "batch", 1e-3, PAPER,
        )  # fmt: skip
    with pytest.raises(MHCError, match="weight must be on the device of x"):
        streams.collapse_streams(p["x"], torch.ones(3, device="meta"))


def test_keys_of_conventions():
    for rule in RULES.values():
        again = Convention.from_key(rule.key())
        assert again is Convention.from_key(rule.key())
        same = dataclasses.replace(again, name=rule.name, alpha_init=rule.alpha_init)
        assert same == rule and same.key() == rule.key()
    keys = {rule.key() for rule in RULES.values()}
    assert len(keys) == len(RULES)
    assert dataclasses.replace(RULES["paper"], norm_eps=0).key() == (
        dataclasses.replace(RULES["paper"], norm_eps=0.0).key()
    )
    for wrong in ("", "[]", '{"res_transposed": true}'):
        with pytest.raises(ConfigError, match="rule must be"):
            Convention.from_key(wrong)


@pytest.mark.long
def test_faster_than_autograd_through_the_reference():
    """`benchmarks/cpu_ops.py` measures more. CPU time, so that other work counts for less."""

    def milliseconds(call, p):
        start = time.process_time()
        out = call(p, RULES["paper"])
        (out[4] + out[0].unsqueeze(-2)).sum().backward()
        return 1e3 * (time.process_time() - start)

    p = parts((4096,), n=4, channels=768, dtype=F32)
    for call in (by_ops, by_reference):
        milliseconds(call, p)
    best = {call: min(milliseconds(call, p) for _ in range(5)) for call in (by_ops, by_reference)}
    assert best[by_reference] > 1.3 * best[by_ops], best


def test_inductor_knows_the_operators(monkeypatch):
    """Else up to torch 2.12 it writes out all that an operator's arguments come from."""

    def chain(x, f, post, res):
        for _ in range(2):
            x = torch.ops.mhc.post_res(x, f, post, res)
        return torch.ops.mhc.pre(x, post)

    for operator in (op.post_res.default, op.pre.default):
        monkeypatch.delitem(lowering.lowerings, operator, raising=False)
    shapes = (3, 2, 8), (3, 8), (3, 2), (3, 2, 2)
    torch.compiler.reset()
    with mock.patch.object(graph.log, "info") as info, config.patch(force_disable_caches=True):
        torch.compile(chain)(*map(torch.randn, shapes))
    assert not info.called, info.call_args_list
