"""Wrong arguments of the public wrappers: each is an MHCError that names the argument.

tests/runtime/test_ops.py has those of `read_streams` and `apply_post_res`.
"""

import pytest
import torch

import mhc_compile as mc
from mhc_compile.conventions import get_convention
from mhc_compile.runtime import streams

F8 = torch.float8_e4m3fn
PAPER = get_convention("paper").key()


def x():
    return torch.randn(2, 3, 4)


def read(**changes):
    given = {"x": x(), "phi": torch.randn(12, 15), "alpha": torch.ones(3), "bias": torch.zeros(15)}
    return streams.coefficients(*(given | changes).values(), PAPER)


def post(**changes):
    module = mc.HyperConnection(4, mc.MHCConfig(streams=3))
    _, state = module.pre(x())
    given = {"x": x(), "f": torch.randn(2, 4)}
    return module.post(*(given | changes).values(), state)


def pre(value):
    return mc.HyperConnection(4, mc.MHCConfig(streams=3)).pre(value)


WRONG = {
    "transposed phi": (lambda: read(phi=torch.randn(15, 12)), ["phi", "[12, 15]", "phi.T"]),
    "phi by channel": (lambda: read(phi=torch.randn(3, 4, 15)), ["phi", "[12, 15]", "[3, 4, 15]"]),
    "float8 phi": (lambda: read(phi=torch.randn(12, 15).to(F8)), ["phi", "float8", "bfloat16"]),
    "float8 streams": (lambda: read(x=x().to(F8)), ["x", "float8", "bfloat16"]),
    "complex streams": (lambda: read(x=x().to(torch.complex64)), ["x", "complex64"]),
    "alpha elsewhere": (lambda: read(alpha=torch.ones(3, device="meta")), ["alpha", "device"]),
    "n of the module": (lambda: pre(torch.randn(2, 4, 4)), ["[..., 3, 4]", "[2, 4, 4]"]),
    "C of the module": (lambda: pre(torch.randn(2, 3, 5)), ["[..., 3, 4]", "[2, 3, 5]"]),
    "plain tensor": (lambda: pre(torch.randn(2, 4)), ["[..., 3, 4]", "expand_streams(x, 3)"]),
    "integer streams": (lambda: pre(torch.ones(2, 3, 4).long()), ["x", "int64"]),
    "module elsewhere": (lambda: pre(x().to("meta")), ["phi", "meta", ".to(...)"]),
    "f's channels": (lambda: post(f=torch.randn(2, 5)), ["f", "[2, 4]", "[2, 5]"]),
    "f's tokens": (lambda: post(f=torch.randn(3, 4)), ["f", "[2, 4]", "[3, 4]"]),
    "integer f": (lambda: post(f=torch.ones(2, 4).int()), ["f", "int32"]),
    "f elsewhere": (lambda: post(f=torch.randn(2, 4, device="meta")), ["f", "device"]),
    "state of others": (lambda: post(x=torch.randn(5, 3, 4), f=torch.randn(5, 4)), ["post", "[5"]),
    "pre's shape": (lambda: streams.apply_pre(x(), torch.ones(2, 4)), ["pre", "[2, 3]"]),
    "pre's dtype": (lambda: streams.apply_pre(x(), torch.ones(2, 3).bool()), ["pre", "bool"]),
    "no streams": (lambda: streams.collapse_streams(torch.ones(4)), ["x", "[..., n, C]"]),
    "weights": (lambda: streams.collapse_streams(x(), torch.ones(4)), ["weight", "[3]", "[4]"]),
    "collapse": (lambda: streams.collapse_streams(x(), mode="max"), ["mode", "'max'"]),
    "no copies": (lambda: streams.expand_streams(x(), 0), ["n must be", "0"]),
    "too many streams": (lambda: mc.MHCConfig(streams=17), ["streams", "16", "17"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name):
    call, words = WRONG[name]
    with pytest.raises(mc.MHCError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
