"""The named conventions and their validation."""

import dataclasses
import json
import subprocess
import sys

import pytest

from mhc_compile.conventions import CONVENTIONS, Convention, get_convention
from mhc_compile.errors import ConfigError

# Facts read from the peers, written out in full so that a slip in a shared default shows.
FACTS = {
    # name: transposed, order, start, counts, eps, mode, iters, norm eps, pre eps, post, alpha
    "paper": (False, "col_row", "exp", False, 0.0, "none", 20, 1e-20, 0.0, 2.0, 0.01),
    "deepseek_v4": (True, "row_col", "softmax", True, 1e-6, "add", 20, 1e-6, 1e-6, 2.0, 1.0),
    "tilekernels": (True, "row_col", "softmax", True, 1e-6, "add", 10, 1e-6, 1e-6, 1.0, 0.01),
    "liger": (False, "row_col", "softmax", True, 1e-6, "add", 20, 1e-6, 0.0, 2.0, 1.0),
    "transformer_engine": (
        True, "row_col", "exp", False, 0.0, "none", 20, 1.1920928955078125e-07, 0.0, 2.0, 0.01,
    ),
}  # fmt: skip


def test_the_names_are_those_of_the_public_surface():
    assert set(CONVENTIONS) == set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_each_axis_has_the_value_of_the_peer(name):
    c = get_convention(name)
    assert c.name == name
    assert c.norm_eps_place == "inside"
    assert (
        c.res_transposed,
        c.sinkhorn_order,
        c.sinkhorn_start,
        c.sinkhorn_start_is_step,
        c.sinkhorn_eps,
        c.sinkhorn_eps_mode,
        c.sinkhorn_iters,
        c.norm_eps,
        c.pre_eps,
        c.post_multiplier,
        c.alpha_init,
    ) == FACTS[name]


def test_a_convention_of_ones_own_is_returned_as_it_is():
    mine = dataclasses.replace(CONVENTIONS["liger"], name="mine", sinkhorn_iters=3)
    assert get_convention(mine) is mine
    assert mine.sinkhorn_axes() == CONVENTIONS["liger"].sinkhorn_axes()


def test_axes_survive_json():
    for convention in CONVENTIONS.values():
        text = json.dumps(dataclasses.asdict(convention))
        assert Convention(**json.loads(text)) == convention


def test_conventions_are_read_only():
    with pytest.raises(TypeError):
        CONVENTIONS["paper"] = CONVENTIONS["liger"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONVENTIONS["paper"].sinkhorn_iters = 1


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("deepseek-v4", "deepseek_v4"),
        ("Paper", "paper"),
        ("transformerengine", "transformer_engine"),
    ],
)
def test_an_unknown_name_lists_the_names_and_the_nearest(wrong, right):
    with pytest.raises(ConfigError) as error:
        get_convention(wrong)
    message = str(error.value)
    assert "convention" in message
    assert f"got {wrong!r}" in message
    assert f"did you mean {right!r}?" in message
    assert all(repr(name) in message for name in CONVENTIONS)


def test_a_far_off_name_suggests_nothing():
    with pytest.raises(ConfigError) as error:
        get_convention("zzzz")
    assert "did you mean" not in str(error.value)


def test_another_type_is_named():
    with pytest.raises(ConfigError, match="convention must be a Convention .* got int"):
        get_convention(4)


@pytest.mark.parametrize(
    ("axes", "parts"),
    [
        ({"sinkhorn_order": "rows"}, ["sinkhorn_order", "'col_row', 'row_col'", "'rows'"]),
        ({"sinkhorn_start": "log"}, ["sinkhorn_start", "'exp', 'softmax'", "'log'"]),
        ({"sinkhorn_eps_mode": "max"}, ["sinkhorn_eps_mode", "'clamp'", "'max'"]),
        ({"norm_eps_place": "left"}, ["norm_eps_place", "'outside'", "'left'"]),
        ({"sinkhorn_iters": 0}, ["sinkhorn_iters", "at least 1", "0"]),
        ({"sinkhorn_iters": 2.0}, ["sinkhorn_iters", "integer", "2.0"]),
        ({"norm_eps": -1e-6}, ["norm_eps", "at least 0", "-1e-06"]),
        ({"norm_eps": "1"}, ["norm_eps", "finite number", "'1'"]),
        ({"pre_eps": float("nan")}, ["pre_eps", "finite number", "nan"]),
        ({"post_multiplier": float("inf")}, ["post_multiplier", "inf"]),
        ({"alpha_init": None}, ["alpha_init", "None"]),
        ({"sinkhorn_eps": 1e-6}, ["sinkhorn_eps=1e-06", "'none'", "contradicts"]),
        ({"sinkhorn_eps_mode": "add"}, ["sinkhorn_eps=0.0", "'add'", "positive"]),
        ({"sinkhorn_start_is_step": True}, ["sinkhorn_start_is_step", "'softmax'", "'row_col'"]),
        (
            {"sinkhorn_start_is_step": True, "sinkhorn_start": "softmax"},
            ["sinkhorn_start_is_step", "'col_row'"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_axis_out_of_range_is_named_with_its_bounds(axes, parts):
    with pytest.raises(ConfigError) as error:
        Convention("mine", **axes)
    assert [part for part in parts if part not in str(error.value)] == []


def test_the_module_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import importlib.util as u;"
        "import types; p = types.ModuleType('mhc_compile'); p.__path__ = [sys.argv[1]];"
        "sys.modules['mhc_compile'] = p; import mhc_compile.conventions as c;"
        "print(c.get_convention('paper').name)"
    )
    package = sys.modules["mhc_compile.conventions"].__file__.rsplit("/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", code, package], capture_output=True, text=True, check=False
    )
    assert done.stdout == "paper\n", done.stderr
