"""`MHCConfig`: defaults, the round trip through JSON, and messages for wrong fields."""

import dataclasses
import json

import pytest

import mhc_compile as mc
from mhc_compile.errors import ConfigError


def test_defaults_are_those_of_the_public_surface():
    c = mc.MHCConfig()
    assert (c.streams, c.connection, c.convention, c.init) == (4, "mhc", "paper", "preserve")
    assert (c.sinkhorn_iters, c.collapse) == (20, "learned")


def test_a_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        mc.MHCConfig().streams = 2
    assert hash(mc.MHCConfig()) == hash(mc.MHCConfig())
    assert mc.MHCConfig() == mc.MHCConfig(streams=4)
    assert mc.MHCConfig() != mc.MHCConfig(streams=3)


@pytest.mark.parametrize("name", mc.CONVENTIONS)
def test_open_axes_come_from_the_convention(name):
    convention = mc.CONVENTIONS[name]
    config = mc.MHCConfig(convention=name, init="paper")
    for axis in dataclasses.fields(convention):
        if axis.name != "name":
            assert getattr(config, axis.name) == getattr(convention, axis.name)
    assert config.rule == convention


CONFIGS = [
    mc.MHCConfig(),
    mc.MHCConfig(streams=1),
    mc.MHCConfig(streams=8, connection="hc", collapse="mean", init="paper"),
    mc.MHCConfig(convention="deepseek_v4", sinkhorn_iters=3, norm_eps=1e-4),
    mc.MHCConfig(convention="tilekernels", init="paper"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.convention}-{c.streams}")
def test_round_trip_through_json(config):
    d = json.loads(json.dumps(config.to_dict()))
    assert mc.MHCConfig.from_dict(d) == config
    assert d["version"] == 1
    before = dict(d)
    mc.MHCConfig.from_dict(d)
    assert d == before


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_version_is_named(version):
    d = {**mc.MHCConfig().to_dict(), "version": version}
    with pytest.raises(ConfigError, match=f"version must be 1, got {version!r}"):
        mc.MHCConfig.from_dict(d)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("stream", "streams"),
        ("n_streams", "streams"),
        ("sinkhorn_iter", "sinkhorn_iters"),
        ("colapse", "collapse"),
        ("convension", "convention"),
    ],
)
def test_an_unknown_field_names_the_nearest(wrong, right):
    for call in (
        lambda: mc.MHCConfig().replace(**{wrong: 1}),
        lambda: mc.MHCConfig.from_dict({"version": 1, wrong: 1}),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert f"{wrong!r} is not a field" in str(error.value)
        assert f"did you mean {right!r}?" in str(error.value)


def test_a_far_off_field_lists_all():
    with pytest.raises(ConfigError) as error:
        mc.MHCConfig().replace(zzzz=1)
    assert "did you mean" not in str(error.value)
    assert all(f.name in str(error.value) for f in dataclasses.fields(mc.MHCConfig))


def test_replace_with_a_convention_brings_its_axes():
    config = mc.MHCConfig(sinkhorn_iters=5, streams=2)
    other = config.replace(convention="liger")
    assert other.sinkhorn_iters == 20
    assert other.streams == 2
    assert other.sinkhorn_start == "softmax"
    assert config.replace(convention="liger", norm_eps=1e-3).norm_eps == 1e-3
    assert config.replace(convention="paper").sinkhorn_iters == 5
    assert config.replace(streams=3).sinkhorn_iters == 5


@pytest.mark.parametrize("streams", [0, 17, -1, 2.0, "4", True, None])
def test_streams_out_of_range(streams):
    with pytest.raises(ConfigError, match="streams must be .*from 1 to 16") as error:
        mc.MHCConfig(streams=streams)
    assert repr(streams) in str(error.value)


def test_preserve_needs_a_reachable_post_gate_of_one():
    for kwargs in ({"convention": "tilekernels"}, {"post_multiplier": 1.0}):
        with pytest.raises(ConfigError, match="post_multiplier=1 .*init='paper'"):
            mc.MHCConfig(**kwargs)
    mc.MHCConfig(convention="tilekernels", post_multiplier=2.0)
    mc.MHCConfig(post_multiplier=1.0, connection="hc")


def test_contradicting_axes_are_refused():
    with pytest.raises(ConfigError, match="sinkhorn_eps"):
        mc.MHCConfig(sinkhorn_eps=1e-6)


def test_errors_are_value_errors():
    assert issubclass(ConfigError, mc.MHCError)
    assert issubclass(mc.MHCError, ValueError)
