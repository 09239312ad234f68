"""backend="mhc" on a CUDA GPU: generated kernels, formulas, CUDA graphs (`make test-gpu`)."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mhc_compile as mc
from mhc_compile.backend.compile_graph import mhc
from mhc_compile.backend.records import last_record
from mhc_compile.codegen.interpreter import interpreting

pytestmark = pytest.mark.skipif(
    interpreting() or not torch.cuda.is_available(), reason="needs a CUDA GPU, TRITON_INTERPRET=0"
)
C = 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(C, eps=1e-6), nn.LayerNorm(C)
        self.mix, self.up, self.down = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x):
        x = x + self.mix(self.norm_1(x)).cumsum(1) * 0.1
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def build(dtype, streams=4, blocks=2):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(blocks)), nn.RMSNorm(C, eps=1e-6))
    model.to("cuda", dtype)
    x = torch.randn(2, 9, C, device="cuda", dtype=dtype)
    mc.transform(model, streams=streams, example_inputs=(x,))
    with torch.no_grad():
        for _, parameter in mc.mhc_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, x


def results(model, call, x):
    model.zero_grad()
    out = call(x)
    (
        out.float() * torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape).cos()
    ).sum().backward()
    return [out.detach().double(), *(p.grad.double() for p in model.parameters())]


def compare(call, model, x, dtype):
    """Against float64, whose operators are torch code; bf16 may be as far off as eager is."""
    exact = copy.deepcopy(model).double()
    wanted = results(exact, exact, x.double())
    eager = results(model, model, x)
    share = 1e-4 if dtype == torch.float32 else 2e-2
    for got, want, near in zip(results(model, call, x), wanted, eager, strict=True):
        assert (got - want).norm() <= share * want.norm() + 3 * (near - want).norm()


@pytest.mark.parametrize("lower", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lowerings(dtype, kernels, lower):
    model, x = build(dtype)
    if lower == "eager" and kernels == "reference":
        return
    torch.compiler.reset()
    options = {"lower": lower, "kernels": kernels}
    call = torch.compile(model, backend=mhc, fullgraph=True, options=options)
    compare(call, model, x, dtype)
    record = last_record()
    assert record.count("seam") == 3 and record.count("rms norm") + record.count("layer norm") == 3
    assert record.kernels == ("triton" if kernels == "triton" else "formulas")


def test_eager_with_the_reference_is_refused():
    model, x = build(torch.float32)
    torch.compiler.reset()
    options = {"lower": "eager", "kernels": "reference"}
    with pytest.raises(Exception, match="needs lower='inductor' or 'aot_eager'"):
        torch.compile(model, backend=mhc, options=options)(x)


@pytest.mark.parametrize("streams", [2, 3, 8, 10])
def test_streams(streams):
    """More than 8 have no kernels, and run from formulas."""
    model, x = build(torch.float32, streams)
    torch.compiler.reset()
    call = torch.compile(model, backend=mhc, fullgraph=True)
    compare(call, model, x, torch.float32)
    assert last_record().kernels == ("triton" if streams <= 8 else "formulas")


def test_cuda_graphs():
    model, x = build(torch.bfloat16)
    torch.compiler.reset()
    call = torch.compile(model, backend=mhc, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        compare(call, model, x, torch.bfloat16)


def test_dynamic_lengths():
    model, _ = build(torch.bfloat16)
    torch.compiler.reset()
    call = torch.compile(model, backend=mhc, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (7, 33, 130):
            compare(call, model, torch.randn(2, length, C, device="cuda", dtype=torch.bfloat16),
                    torch.bfloat16)  # fmt: skip


def test_runs_repeat_bit_by_bit():
    model, x = build(torch.bfloat16)
    torch.compiler.reset()
    call = torch.compile(model, backend=mhc, fullgraph=True)
    first, second = results(model, call, x), results(model, call, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("lower", ["aot_eager", "inductor"])
def test_overlap(lower):
    """F_post,res of MLPs runs on a stream of high priority; results and their memory stay right."""
    model, x = build(torch.bfloat16, blocks=3)
    torch.compiler.reset()
    call = torch.compile(model, backend="mhc", options={"overlap": True, "lower": lower})
    compare(call, model, x, torch.bfloat16)
    servers = [piece.server for piece in last_record().pieces["forward"]]
    assert servers.count("hp") >= 3
    whole = torch.compile(copy.deepcopy(model), backend="mhc", options={"lower": "aot_eager"})
    for _ in range(20):  # what a stream frees too early another one overwrites
        noise = [torch.randn_like(x) for _ in range(8)]
        torch.testing.assert_close(call(x), whole(x), rtol=2e-2, atol=2e-2)
        del noise
