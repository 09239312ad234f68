"""Options of the backend: what is refused, and with which words."""

import pytest
import torch

from mhc_compile import MHCError
from mhc_compile.backend import mhc
from mhc_compile.backend.options import parse_options
from mhc_compile.errors import ConfigError

WRONG = {
    "misspelt": ({"lowre": "eager"}, "did you mean 'lower'"),
    "unknown": ({"zzz": 1}, "the options are recompute, memory_budget, fuse, overlap, lower"),
    "lower": ({"lower": "cuda"}, "lower must be one of 'inductor', 'aot_eager', 'eager'"),
    "kernels": ({"kernels": "cutlass"}, "kernels must be one of 'auto', 'triton', 'reference'"),
    "kernels type": ({"kernels": ["triton"]}, "kernels must be one of"),
    "fuse": ({"fuse": 1}, "fuse must be True or False, got 1"),
    "overlap": ({"overlap": "yes"}, "overlap must be True or False, got 'yes'"),
    "overlap in eager": ({"overlap": True, "lower": "eager"}, "needs lower='inductor' or"),
    "overlap, graphs": ({"overlap": True, "mode": "reduce-overhead"}, "and no CUDA graphs"),
    "overlap, autotune": ({"overlap": True, "mode": "max-autotune"}, "and no CUDA graphs"),
    "overlap, setting": (
        {"overlap": True, "inductor": {"triton.cudagraphs": True}},
        "and no CUDA graphs",
    ),
    "recompute": ({"recompute": "papre"}, "recompute must be one of 'off', 'paper'"),
    "block size": ({"recompute": 0}, "a block size of at least 1"),
    "bool": ({"recompute": True}, "a block size of at least 1"),
    "blocks": ({"recompute": (2, 0)}, "a block size of at least 1"),
    "no blocks": ({"recompute": ()}, "a block size of at least 1"),
    "budget alone": ({"memory_budget": 5}, "belong together"),
    "no budget": ({"recompute": "budget"}, "belong together"),
    "negative budget": ({"recompute": "budget", "memory_budget": -1}, "at least 1, got -1"),
    "budget type": ({"recompute": "budget", "memory_budget": 1.5}, "must be a number of bytes"),
    "mode": ({"mode": "fast"}, "mode must be one of 'default', 'reduce-overhead'"),
    "inductor": ({"inductor": 3}, "must be a dict"),
    "inductor name": ({"inductor": {"max_autotun": True}}, "did you mean 'max_autotune'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    options, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        parse_options(options)


def test_right():
    assert parse_options(None).lower == "inductor"
    assert parse_options({"recompute": [3, 2]}).recompute == (3, 2)
    assert parse_options({"recompute": "budget", "memory_budget": 10**9}).memory_budget == 10**9
    settings = parse_options({"inductor": {"max_autotune": True}}).inductor_config()
    assert settings == {"max_autotune": True}
    assert parse_options(None, "max-autotune").inductor_config()["max_autotune"] is True


def test_torch_compile_shows_the_error():
    model = torch.nn.Linear(4, 4)
    compiled = torch.compile(model, backend=mhc, options={"fused": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="did you mean 'fuse'"):
        compiled(torch.randn(2, 4))


def test_triton_without_a_gpu():
    import mhc_compile as mc

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = torch.nn.Sequential(mc.HyperConnection(8, mc.MHCConfig(streams=2)))
    compiled = torch.compile(model, backend=mhc, options={"kernels": "triton"})
    with pytest.raises(Exception, match="kernels='triton' cannot run this graph: .* a CUDA GPU"):
        compiled(torch.randn(3, 2, 8))
    assert issubclass(ConfigError, MHCError)
