"""Properties of random transformers: what is found, what the result computes, what is refused.

MHC_PROPERTY_DRAWS is the number of draws, MHC_TEST_SEED draws anew. A failure prints the shrunk
`Spec`, which `check(Spec(...))` replays.
"""

import itertools
import os
import re
import traceback
import warnings
from collections import Counter
from pathlib import Path

import generator
import pytest
import torch
from generator import build, make_inputs
from hypothesis import HealthCheck, Phase, given, seed, settings
from models import assert_unchanged, perturb, snapshot
from reference import Reference, open_readings, true_sites
from specs import all_sites, shrink, specs

import mhc_compile as mc

DRAWS = int(os.getenv("MHC_PROPERTY_DRAWS", "200"))
SHARDS = 8
LINES = Path(generator.__file__).read_text().splitlines()


def may_refuse(spec):
    """Whether the library may say no: these streams are handled or refused, never guessed."""
    return (
        must_refuse(spec)
        or any(
            "bct" in (stack.layout, stack.inner)  # the channel axis is not the last
            or stack.inject != "none"  # earlier states come back
            or stack.carry == "data"  # an object of the user's own class
            # an add that runs within an autograd function, in a block that cannot be its owner
            or (stack.checkpoint == "reentrant" and (stack.repeat or stack.pad))
            or stack.hook == "halve"  # a hook writes the stream, no line of a block does
            for stack in spec.stacks
        )
        or any(site.scale == "addcmul_skip" for site in all_sites(spec))
    )


def must_refuse(spec):
    """A skip that is gated by what it holds has no counterpart in mHC."""
    return any(site.scale == "highway" for site in all_sites(spec))


def tolerance(spec):
    """Relative; a branch in bfloat16 rounds inputs that differ in the last bit of float32."""
    return 5e-2 if any(site.cast == "branch16" for site in all_sites(spec)) else 1e-5


def results(model, inputs):
    out = model(*inputs)
    return out if isinstance(out, tuple) else (out,)


def distance(got, expected):
    """The largest difference, relative to the largest value (at least 1)."""
    assert len(got) == len(expected)
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        worst = max(worst, float((a - b).abs().max()) / max(1.0, float(b.abs().max())))
    return worst


def check(spec):
    """Checks all properties of one draw; returns what became of it."""
    model, inputs = build(spec), make_inputs(spec)
    other = make_inputs(spec, spec.batch + 1, spec.length + 2, seed=2)
    with torch.no_grad():
        plain, plain_other = results(model, inputs), results(model, other)
        assert all(bool(t.isfinite().all()) for t in plain), "the draw is not finite"
        assert distance(Reference(model)(*inputs), plain) <= 1e-5, "the generator disagrees"
    before = snapshot(model)
    sites = mc.find_residuals(model, inputs)
    assert_unchanged(before, model)
    check_sites(spec, sites)
    try:
        mc.transform(model, example_inputs=inputs, streams=spec.n)
    except mc.MHCError as error:
        check_refusal(spec, model, inputs, before, error, plain)
        return f"refused: {_kind(error)}"
    assert not must_refuse(spec), "rewritten, though the skip is gated by a computed value"
    assert all(site.accepted for site in sites), "transform took what find_residuals refuses"
    with torch.no_grad():
        assert distance(results(model, inputs), plain) <= tolerance(spec), "step 0"
        assert distance(results(model, other), plain_other) <= tolerance(spec), "another shape"
        perturb(model, seed=spec.seed)
        check_against_reference(spec, model, sites, inputs)
    if spec.n > 1:
        check_gradients(model, inputs)
    mc.revert(model)
    assert_unchanged(before, model)
    with torch.no_grad():
        assert all(map(torch.equal, results(model, other), plain_other)), "revert"
    return "rewritten"


def check_sites(spec, sites):
    """Count, streams, order, owner and source line of what was found."""
    truth = true_sites(spec)
    streams = [site.stream for site in sites]
    expected = [k for k, found in enumerate(truth) for _ in found]
    assert len(streams) >= len(expected), f"missed: {len(streams)} of {len(expected)}"
    assert len(streams) <= len(expected), f"spurious: {len(streams)} for {len(expected)}"
    # Refused adds on another axis than that of their neighbours may be listed apart.
    one_axis = not any("bct" in (stack.layout, stack.inner) for stack in spec.stacks)
    if one_axis:
        assert streams == expected, f"streams: {streams} for {expected}"
    assert len({site.name for site in sites}) == len(sites), "names"
    for site in sites:
        file, line = site.source.rsplit(":", 1)
        assert file == "generator.py" and LINES[int(line) - 1].endswith("# site"), "source"
    for site, (k, b, j) in zip(sites, itertools.chain(*truth), strict=True):
        if not one_axis:
            break
        block = f"joint.{b}." if j < 0 else f"stacks.{k}.blocks.{b}."
        owner = f"{site.module}." if site.module else ""
        assert block.startswith(owner) or owner.startswith(block), "owner"
        assert site.channels == spec.width + (3 * k if spec.topology == "stages" else 0)


def check_refusal(spec, model, inputs, before, error, plain):
    """The model is as before, the message has a line, and strict=False keeps the function."""
    assert_unchanged(before, model)
    lines = re.findall(r"\S+\.py:\d+", str(error))  # torch's containers count as user code
    assert lines and "mhc_compile" not in lines[0], f"no source line: {error}"
    assert may_refuse(spec), f"refused: {error}"
    try:
        mc.transform(model, example_inputs=inputs, streams=spec.n, strict=False)
    except mc.MHCError:
        assert_unchanged(before, model)
        return
    with torch.no_grad():
        assert distance(results(model, inputs), plain) <= tolerance(spec), "strict=False"
    mc.revert(model)
    assert_unchanged(before, model)


def check_against_reference(spec, model, sites, inputs):
    got = results(model, inputs)
    original = build(spec)
    if spec.n == 1:
        assert distance(got, results(original, inputs)) == 0, "one stream"
        return
    connections, weights = parameters_of(spec, model, sites)
    differences = [
        distance(got, Reference(original, connections, weights, readings)(*inputs))
        for readings in itertools.product(*open_readings(spec))
    ]
    # Perturbed gates multiply the rounding of the sublayers by the size of what they pass on.
    assert min(differences) <= 5 * tolerance(spec), f"reference: {min(differences):.2g}"


def parameters_of(spec, model, sites):
    """The connections' parameters for each stream, in the order of its sites."""
    truth = true_sites(spec)
    state = model.state_dict()
    streams = [[] for _ in truth]
    named = list(zip(sites, itertools.chain(*truth), strict=True))
    if spec.topology in ("interleaved", "joint"):
        # Within one owner, connections count in execution order: joint attention comes first.
        named.sort(key=lambda pair: (pair[1][1], pair[1][2] >= 0, pair[1][0], pair[1][2]))
    count = Counter()
    ends = {}
    for site, (k, _, _) in named:
        prefix = f"{site.module}.mhc." if site.module else "mhc."
        name = f"{prefix}{count[prefix]}"
        count[prefix] += 1
        streams[k].append(tuple(state[f"{name}.{key}"] for key in ("phi", "alpha", "bias")))
        ends[k] = prefix
    used, weights = Counter(), []
    for k in range(len(truth)):
        names = [n for n in state if n.startswith(f"{ends[k]}collapse")]
        weights.append(state[names[used[ends[k]]]])
        used[ends[k]] += 1
    return streams, weights


def check_gradients(model, inputs):
    """In half of the draws in training mode, which the library has not seen yet."""
    drops = [site.drop for site in all_sites(model.spec)]
    model.train(model.spec.seed % 2 == 1 and "path" not in drops)  # a dropped path has none
    inputs = [i.clone().requires_grad_() if i.is_floating_point() else i for i in inputs]
    total = sum((out * torch.randn_like(out)).sum() for out in results(model, inputs))
    total.backward()
    for name, parameter in mc.mhc_parameters(model):
        assert parameter.grad is not None, f"no gradient: {name}"
        assert bool(parameter.grad.isfinite().all()), f"gradient not finite: {name}"
        assert float(parameter.grad.abs().max()) > 0, f"gradient is zero: {name}"
    model.zero_grad()
    model.eval()


def outcome(spec):
    """What became of a draw, and how it failed if it did: two failures of one kind look alike."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(spec.seed)
            return check(spec), ""
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__} in {Path(frame.filename).name}: {_kind(error)}"


def _kind(error):
    """The start of a message without the numbers and names of the draw."""
    text = re.sub("the residual add at .* cannot be rewritten: ", "", str(error).split("\n")[0])
    return re.sub(r"'stacks[\w.]*'|\[[\d, ]*\]|\d+(\.\d+)?(e-?\d+)?", "*", text)[:120]


def smallest(found, failure):
    """A plain spec that fails in the same way."""
    return shrink(min(found, key=lambda s: len(repr(s))), lambda s: outcome(s)[1] == failure)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_transformers(shard, record_property):
    counts, failures = Counter(), {}

    @seed(1000 * int(os.getenv("MHC_TEST_SEED", "0")) + shard)
    @settings(
        max_examples=-(-DRAWS // SHARDS), phases=[Phase.generate], database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(specs())
    def draw(spec):
        result, failure = outcome(spec)
        counts[result.split(":")[0]] += 1
        if failure:
            failures.setdefault(failure, []).append(spec)

    draw()
    record_property("draws", dict(counts))
    report = [
        f"{len(found)} x {failure}\n    check({smallest(found, failure)!r})"
        for failure, found in failures.items()
    ]
    assert not failures, f"{dict(counts)}\n" + "\n".join(report)
