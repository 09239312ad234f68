"""Under DistributedDataParallel, where torch.compile cuts graphs at buckets."""

import warnings

import pytest
import torch
import torch.distributed as dist
from test_passes import C, Sublayers
from torch.nn.parallel import DistributedDataParallel

from mhc_compile.backend import mhc
from mhc_compile.backend.records import last_record


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.compiler.reset()
    yield
    dist.destroy_process_group()
    torch.compiler.reset()


def gradients(call, model, x):
    model.zero_grad()
    call(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compiled(model, bucket):
    parallel = DistributedDataParallel(model, bucket_cap_mb=bucket)
    return torch.compile(parallel, backend=mhc, options={"lower": "aot_eager"})


def test_cuts_between_merge_and_read_are_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    model, x = Sublayers(4), torch.randn(2, 5, C)
    wanted = gradients(model, model, x)
    with pytest.warns(UserWarning, match="blocks one by one.*optimize_ddp = False"):
        got = gradients(compiled(model, 1e-3), model, x)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


class Scaled(Sublayers):
    def between(self, k, x):
        return 1.5 * x


def test_other_reasons_are_not_taken_for_cuts():
    """Streams that something stands between, a single sublayer: one bucket, nothing is cut."""
    for model in (Scaled(3), Sublayers(1)):
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="backend='mhc'")
            gradients(compiled(model, 25), model, torch.randn(2, 5, C))


@pytest.mark.parametrize("how", ["one bucket", "no cuts"])
def test_nothing_is_said_where_seams_are_fused(how, monkeypatch):
    if how == "no cuts":
        monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    model, x = Sublayers(4), torch.randn(2, 5, C)
    wanted = gradients(model, model, x)
    with torch._dynamo.config.patch(optimize_ddp=how != "no cuts"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="backend='mhc'")
        got = gradients(compiled(model, 25 if how == "one bucket" else 1e-3), model, x)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert last_record().count("seam") == 3
