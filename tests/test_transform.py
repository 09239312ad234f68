"""`transform`, `find_residuals`, `revert` and `mhc_parameters` on seven kinds of model."""

import copy

import pytest
import torch
from models import ARCHITECTURES, WIDTH, largest, logits, perturb
from torch import nn

import mhc_compile as mc

NAMES = list(ARCHITECTURES)


def built(name, seed=0, dropout=0.0):
    architecture = ARCHITECTURES[name]
    return architecture, architecture.build(seed, dropout)


@torch.no_grad()
def run(model, inputs):
    return logits(model, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_sites_are_those_of_the_source_code(name):
    architecture, model = built(name)
    found = mc.find_residuals(model, architecture.inputs())
    assert [(site.name, site.stream) for site in found] == list(architecture.sites)
    for site in found:
        assert site.accepted, site.reason
        assert site.reason == ""
        assert site.channels == WIDTH
        assert site.name.startswith(f"{site.module}.")
        assert isinstance(model.get_submodule(site.module), nn.Module)
        file, line = site.source.split(":")
        assert file.endswith(".py")
        assert int(line) > 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3_moe", "bert", "t5", "nanogpt"])
def test_inputs_are_derived_where_they_are_evident(name):
    architecture, model = built(name)
    found = mc.find_residuals(model)
    assert [(site.name, site.stream) for site in found] == list(architecture.sites)


@pytest.mark.parametrize("name", NAMES)
def test_find_residuals_changes_nothing(name):
    architecture, model = built(name, dropout=0.1)
    model.train()
    next(model.children()).eval()  # a mixed mode has to come back too
    modes = {n: m.training for n, m in model.named_modules()}
    classes = {n: type(m) for n, m in model.named_modules()}
    attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    mc.find_residuals(model, architecture.inputs())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: sorted(m.__dict__) for n, m in model.named_modules()} == attributes
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights.pop(key))
    assert not weights
    assert not mc.is_transformed(model)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_step_0_keeps_the_function(name, n):
    architecture, model = built(name, seed=n)
    calls = [architecture.inputs(2, 8, seed=n), architecture.inputs(2, 8, seed=n + 10)]
    # Other batch sizes and lengths than the example's, down to a single token.
    calls += [architecture.inputs(*shape, seed=n) for shape in [(1, 1), (3, 5), (1, 13), (2, 1)]]
    before = [run(model, call) for call in calls]
    assert mc.transform(model, example_inputs=calls[0], streams=n) is model
    assert mc.is_transformed(model)
    for call, expected in zip(calls, before, strict=True):
        got = run(model, call)
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        if n == 1:
            assert torch.equal(got, expected)
        else:
            assert (got - expected).abs().max() <= 1e-6 * largest(expected)


@pytest.mark.parametrize("collapse", ["learned", "mean", "sum"])
@pytest.mark.parametrize("connection", ["mhc", "hc"])
def test_step_0_keeps_the_function_for_every_collapse(connection, collapse):
    architecture, model = built("nanogpt")
    inputs = architecture.inputs()
    before = run(model, inputs)
    mc.transform(model, example_inputs=inputs, connection=connection, collapse=collapse)
    assert (run(model, inputs) - before).abs().max() <= 1e-6 * largest(before)


def test_step_0_with_init_paper_is_another_function():
    architecture, model = built("nanogpt")
    inputs = architecture.inputs()
    before = run(model, inputs)
    mc.transform(model, example_inputs=inputs, init="paper")
    assert (run(model, inputs) - before).abs().max() > 1e-3


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_training_with_dropout_backpropagates(name, n):
    architecture, model = built(name, dropout=0.5 if name != "llama" else 0.9)
    inputs = architecture.inputs()
    mc.transform(model, example_inputs=inputs, streams=n)
    if n > 1:
        perturb(model)
    model.train()
    first, second = logits(model, inputs), logits(model, inputs)
    assert (first - second).abs().max() > 1e-3, "dropout has no effect"
    first.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None or "pooler" in key, key
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), key
    model.eval()
    assert torch.equal(run(model, inputs), run(model, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_the_original_state_dict_loads_strictly(name):
    architecture, other = built(name, seed=5)
    inputs = architecture.inputs(seed=3)
    original_state, expected = other.state_dict(), run(other, inputs)
    _, model = built(name, seed=6)
    mc.transform(model, example_inputs=inputs)
    own = {k: p.detach().clone() for k, p in mc.mhc_parameters(model)}
    result = model.load_state_dict(original_state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert (run(model, inputs) - expected).abs().max() <= 1e-6 * largest(expected)
    now = dict(mc.mhc_parameters(model))
    assert now.keys() == own.keys()
    assert all(torch.equal(now[k], own[k]) for k in own)


def test_a_full_state_dict_restores_the_connections():
    architecture, model = built("gpt2")
    inputs = architecture.inputs()
    perturb(mc.transform(model, example_inputs=inputs), seed=1)
    _, other = built("gpt2", seed=8)
    mc.transform(other, example_inputs=inputs).load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(other, inputs), run(model, inputs))


def test_strict_loading_still_names_missing_and_unknown_keys():
    architecture, model = built("nanogpt")
    mc.transform(model, example_inputs=architecture.inputs())
    state = model.state_dict()
    del state["h.0.mlp.0.weight"]
    del state["h.0.mhc.1.alpha"]
    state["h.0.mhc.1.gamma"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state, strict=True)
    for key in ("h.0.mlp.0.weight", "h.0.mhc.1.alpha", "h.0.mhc.1.gamma"):
        assert key in str(error.value)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_revert_restores_the_model(name, n):
    architecture, model = built(name, seed=n)
    inputs = architecture.inputs(seed=n)
    before = run(model, inputs)
    classes = {k: type(m) for k, m in model.named_modules()}
    attributes = {k: sorted(m.__dict__) for k, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    mc.transform(model, example_inputs=inputs, streams=n)
    if n > 1:
        perturb(model)
        assert (run(model, inputs) - before).abs().max() > 1e-3
    assert mc.revert(model) is model
    assert not mc.is_transformed(model)
    assert {k: type(m) for k, m in model.named_modules()} == classes
    assert {k: sorted(m.__dict__) for k, m in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(run(model, inputs), before)
    # And the whole way once more.
    mc.transform(model, example_inputs=inputs, streams=2)
    assert (run(model, inputs) - before).abs().max() <= 1e-6 * largest(before)


@pytest.mark.parametrize("name", NAMES)
def test_mhc_parameters_are_exactly_the_new_ones(name):
    architecture, model = built(name)
    old = {k: id(p) for k, p in model.named_parameters()}
    mc.transform(model, example_inputs=architecture.inputs(), streams=3)
    everything = dict(model.named_parameters())
    found = list(mc.mhc_parameters(model))
    assert {k for k, _ in found} == everything.keys() - old.keys()
    assert len({id(p) for _, p in found}) == len(found)
    assert all(everything[k] is p and p.requires_grad for k, p in found)
    assert all(id(everything[k]) == i for k, i in old.items())
    # phi, alpha and bias a site, one collapse weight a stream.
    streams = {stream for _, stream in architecture.sites}
    assert len(found) == 3 * len(architecture.sites) + len(streams)
    shapes = {k.rsplit(".", 1)[1]: tuple(p.shape) for k, p in found}
    assert shapes == {"phi": (3 * WIDTH, 15), "alpha": (3,), "bias": (15,), "weight": (3,)}


def test_one_stream_adds_no_parameters():
    architecture, model = built("gpt2")
    mc.transform(model, example_inputs=architecture.inputs(), streams=1)
    assert list(mc.mhc_parameters(model)) == []


@pytest.mark.parametrize("call", [mc.revert, lambda m: list(mc.mhc_parameters(m))])
def test_a_plain_model_has_nothing_to_revert(call):
    with pytest.raises(mc.MHCError, match="call mhc_compile.transform"):
        call(built("nanogpt")[1])


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_isinstance_and_class_names_go_on_working(name):
    architecture, model = built(name)
    blocks = {s.module for s in mc.find_residuals(model, architecture.inputs())}
    classes = {b: type(model.get_submodule(b)) for b in blocks}
    mc.transform(model, example_inputs=architecture.inputs())
    for block, cls in classes.items():
        assert isinstance(model.get_submodule(block), cls)


def test_filter_fn_leaves_a_site_plain():
    architecture, model = built("nanogpt", seed=2)
    inputs = architecture.inputs()
    before = run(model, inputs)
    mc.transform(model, example_inputs=inputs, filter_fn=lambda site: site.name != "h.0.mlp")
    # Two streams now: one around h.0.attn, one from h.1.attn on; each collapses by itself.
    names = {k.rsplit(".", 1)[0] for k, _ in mc.mhc_parameters(model)}
    assert names == {"h.0.mhc.0", "h.0.mhc.collapse", "h.1.mhc.0", "h.1.mhc.1", "h.1.mhc.collapse"}
    assert (run(model, inputs) - before).abs().max() <= 1e-6 * largest(before)
