"""The formulas that Inductor gets equal the operators, on every argument that may be missing."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mhc_compile.backend import formulas
from mhc_compile.conventions import CONVENTIONS
from mhc_compile.runtime import fused, ops

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def draw(n, channels, dtype, lead=(3, 5), convention="paper", missing=(), norm="rms"):
    """Arguments of every operator, by the names in its schema."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    maps = n * n + 2 * n

    def normal(*shape, kind=dtype):
        return torch.randn(shape, dtype=torch.float64).to(kind)

    rule = CONVENTIONS[convention].key()
    given = {
        "x": normal(*lead, n, channels), "f": normal(*lead, channels),
        "phi": normal(n * channels, maps, kind=work) * (n * channels) ** -0.5,
        "alpha": normal(3, kind=work), "bias": normal(maps, kind=work),
        "g_h": normal(*lead, channels), "g_y": normal(*lead, n, channels),
        "g_pre": normal(*lead, n, kind=work), "g_post": normal(*lead, n, kind=work),
        "g_res": normal(*lead, n, n, kind=work),
        "rule": rule, "norm": norm, "norm_eps": 1e-5, "need_phi": True, "need_h": True, "n": n,
        "weight": normal(channels) if norm != "none" else None,
        "shift": normal(channels) if norm == "layer" else None,
    }  # fmt: skip
    _, given["pre"], given["post"], given["res"], given["proj"], given["square"] = fused.read(
        given["x"], given["phi"], given["alpha"], given["bias"], rule
    )
    out = fused.seam(*(given[k] for k in ("x", "f", "post", "res", "phi", "alpha", "bias")),
                     given["weight"], given["shift"], norm, 1e-5, rule)  # fmt: skip
    given["y"], given["pre_next"] = out[0], out[2]
    return {**given, **dict.fromkeys(missing)}


def arguments(name, given):
    declared = getattr(torch.ops.mhc, name).default._schema.arguments
    changed = dict(given)
    if name == "seam_backward":  # its products are those of y
        changed["proj"], changed["square"] = fused.coefficients(
            given["y"], given["phi"], given["alpha"], given["bias"], given["rule"]
        )[3:]
    if name.startswith("expand"):
        changed["x"] = given["f"]
    if name.startswith("collapse"):
        changed["weight"] = given["pre"].reshape(-1, given["n"])[0].contiguous()
    return [changed[a.name] for a in declared]


def check(name, given, dtype):
    args = arguments(name, given)
    wanted, got = getattr(fused, name)(*args), getattr(formulas, name)(*args)
    if isinstance(wanted, torch.Tensor):
        wanted, got = (wanted,), (got,)
    assert len(wanted) == len(got)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if b.numel():
            assert (a - b).abs().max() <= LIMITS[dtype] * b.abs().max()


NAMES = [name for name in ops.SCHEMAS if not name.startswith("maps")]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_formula_equals_operator(name, n, dtype):
    check(name, draw(n, 12, dtype), dtype)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_conventions_and_norms(convention, norm):
    for name in ("seam", "seam_backward", "read_backward"):
        check(name, draw(3, 7, torch.float64, convention=convention, norm=norm), torch.float64)


@pytest.mark.parametrize(
    "missing",
    [("g_y",), ("g_h",), ("g_pre",), ("g_post", "g_res"), ("weight",), ("g_y", "g_pre", "g_res")],
    ids=" ".join,
)
def test_gradients_that_are_zero(missing):
    given = draw(4, 6, torch.float64, missing=missing)
    for name in ("seam_backward", "read_backward", "coefficients_backward"):
        if not ("weight" in missing and name != "seam_backward"):
            check(name, given, torch.float64)


def test_phi_without_gradient():
    given = {**draw(4, 6, torch.float64), "need_phi": False}
    for name in ("seam_backward", "read_backward", "coefficients_backward"):
        check(name, given, torch.float64)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 1, 3)], ids=str)
def test_leading_dimensions(lead):
    given = draw(2, 5, torch.float64, lead=lead)
    for name in ("seam", "seam_backward", "read", "post_res_backward", "pre"):
        check(name, given, torch.float64)


def test_copies_are_read_as_one_row():
    given = draw(4, 6, torch.float64)
    copies = given["f"].unsqueeze(-2).expand(3, 5, 4, 6)
    args = given["phi"], given["alpha"], given["bias"], given["rule"]
    for a, b in zip(formulas.read(copies, *args), fused.read(copies, *args), strict=True):
        torch.testing.assert_close(a, b)
    graph = make_fx(lambda x: formulas.read(x, *args))(copies).graph
    shapes = [n.meta["val"].shape for n in graph.nodes if "mm" in str(n.target)]
    assert shapes == [(15, 24)]
