"""The operators on a CUDA GPU as a model uses them: autograd, torch.compile, CUDA graphs, modules.

`make test-gpu`; skipped without a GPU, and where Triton's interpreter is on.
"""

import copy

import pytest
import torch
from operators import Case, check, cotangents, gradients, inputs_of, run

import mhc_compile as mc
from mhc_compile.codegen import launch
from mhc_compile.codegen.interpreter import interpreting
from mhc_compile.conventions import get_convention
from mhc_compile.runtime import streams
from mhc_compile.runtime.high_priority import high_priority

pytestmark = pytest.mark.skipif(
    interpreting() or not torch.cuda.is_available(), reason="needs a CUDA GPU, TRITON_INTERPRET=0"
)
BF16 = torch.bfloat16
PAPER = get_convention("paper").key()


@pytest.mark.parametrize("op", ["coefficients", "pre", "post_res", "read", "seam", "collapse"])
def test_opcheck(op):
    case = Case(op, 4, 64, 20, BF16)
    p = inputs_of(case, "cuda")
    values = list(p.values())
    if op in ("coefficients", "read"):
        values.append(case.key)
    if op == "seam":
        values += [None, None, "none", 1e-6, case.key]
    torch.library.opcheck(getattr(torch.ops.mhc, op).default, tuple(values))


def test_large_shapes():
    for case in (
        Case("seam", 4, 4096, 1000, BF16, norm="rms"), Case("read", 4, 2560, 700, BF16),
        Case("seam", 4, 4096, 2100, BF16, norm="rms"),  # enough for the table's tiles
    ):  # fmt: skip
        check(case, inputs_of(case, "cuda"))


@pytest.mark.parametrize("odd", [False, True], ids=["again", "not aligned"])
def test_kernels_that_are_known(odd):
    """A second launch skips Triton's search; for memory that is not aligned it must not."""
    case = Case("seam", 4, 64, 33, BF16, norm="rms")
    check(case, inputs_of(case, "cuda"))
    p = inputs_of(case, "cuda")
    for name, value in p.items() if odd else ():
        room = torch.empty(value.numel() + 1, dtype=value.dtype, device="cuda")[1:]
        p[name] = room.copy_(value.detach().flatten()).view(value.shape).requires_grad_()
        assert p[name].data_ptr() % 16
    check(case, p)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one():
    case = Case("seam", 4, 64, 33, BF16, norm="rms")
    check(case, inputs_of(case, "cuda:1"))
    check(case, inputs_of(case, "cuda:0"))


def test_more_than_2_to_31_elements():
    """The last tokens of a call with that many are those of a call of their own."""
    case = Case("seam", 4, 4096, 2**17 + 70, BF16, norm="rms")
    p = inputs_of(case, "cuda")
    few = {n: t[-70:] if n in ("x", "f", "post", "res") else t for n, t in p.items()}
    small = Case("seam", 4, 4096, 70, BF16, norm="rms", apart=True)
    with torch.no_grad():
        for a, b in zip(run(case, p), run(small, few), strict=True):
            torch.testing.assert_close(a[-70:], b, rtol=1e-2, atol=1e-4)


def test_compiled():
    def step(x, f, phi, alpha, bias):
        h, _, post, res = streams.read_streams(x, phi, alpha, bias, PAPER)
        return streams.apply_post_res(x, torch.tanh(h) + f, post, res)

    p = inputs_of(Case("read", 4, 64, 50, BF16), "cuda")
    f = torch.randn(50, 64, device="cuda", dtype=BF16, requires_grad=True)
    values = [p["x"], f, p["phi"], p["alpha"], p["bias"]]
    given = torch.randn_like(p["x"])
    right = step(*values)
    got = torch.compile(step, fullgraph=True)(*values)
    torch.testing.assert_close(got, right, rtol=2e-2, atol=2e-2)
    for a, b in zip(
        torch.autograd.grad(got, values, given), torch.autograd.grad(right, values, given),
        strict=True,
    ):  # fmt: skip
        assert (a - b).double().norm() <= 2e-2 * b.double().norm()


@pytest.mark.parametrize("tokens", [20, 500])
def test_cuda_graph(tokens):
    """Captured and replayed on other inputs; eager calls afterwards are not disturbed."""
    case = Case("seam", 4, 256, tokens, BF16, norm="rms")
    p = inputs_of(case, "cuda")
    given = cotangents(case, run(case, p))
    gradients(run(case, p), p, given)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(case, p)
        back = gradients(out, p, given)
    for _ in range(2):
        with torch.no_grad():
            p["x"].copy_(torch.randn_like(p["x"]))
        graph.replay()
        right = run(case, p)
        for a, b in zip(out, right, strict=True):
            assert torch.equal(a, b)
        for name, b in gradients(right, p, given).items():
            assert torch.equal(back[name], b), name


def test_streams_of_the_device():
    """Calls on two CUDA streams at once."""
    case = Case("seam", 4, 256, 40, BF16, norm="rms")
    inputs = [inputs_of(case, "cuda") for _ in range(2)]
    right = [run(case, p) for p in inputs]
    queues = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for p, queue in zip(inputs, queues, strict=True):
            with torch.cuda.stream(queue):
                results.append(run(case, p))
        torch.cuda.synchronize()
        for got, expected in zip(results, right, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("connection", ["mhc", "hc"])
def test_module_equals_the_cpu(connection):
    config = mc.MHCConfig(streams=4, connection=connection)
    module = mc.HyperConnection(64, config)
    x = torch.randn(3, 5, 4, 64)
    results = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(module).to(device)
        leaf = x.detach().clone().to(device).requires_grad_()
        h, state = own.pre(leaf)
        y = own.post(leaf, torch.tanh(h), state)
        y.square().sum().backward()
        grads = [p.grad.cpu() for p in own.parameters() if p.grad is not None]
        results.append([y.detach().cpu(), leaf.grad.cpu(), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


def test_merges_on_a_stream_of_high_priority(monkeypatch):
    """Kernels of the forward alone are launched there; every bit stays, and memory is kept."""
    places = []

    def note(name):
        operator = getattr(launch, name)

        def noted(*args):
            places.append((name, torch.cuda.current_stream()))
            return operator(*args)

        monkeypatch.setattr(launch, name, noted)

    for name in ("post_res", "post_res_backward"):
        note(name)
    p = inputs_of(Case("post_res", 4, 256, 4000, BF16), "cuda")
    values, given = list(p.values()), torch.randn_like(p["x"])

    def step():
        y = p["x"]
        for _ in range(3):
            y = streams.apply_post_res(y * 1.5, *values[1:], after_mlp=True)
        return [y, *torch.autograd.grad(y, values, given)]

    right = step()
    own, high = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
    torch.cuda.synchronize()
    for _ in range(20):  # what is freed too early is written over
        places.clear()
        with torch.cuda.stream(own), high_priority(high):
            got = step()
            noise = [torch.randn_like(given) for _ in range(8)]
        torch.cuda.synchronize()
        del noise
        assert all(map(torch.equal, got, right))
        assert places == 3 * [("post_res", high)] + 3 * [("post_res_backward", own)]
