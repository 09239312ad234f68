"""The checks of the zoo: what must hold for every architecture, one function a check."""

import copy
import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from entry import GENERATE, Entry
from lockstep import reference_result
from models import SPREAD, assert_unchanged, normal, perturb, snapshot
from torch import nn

import mhc_compile as mc

STEP0 = 1e-5
"""Largest difference at step 0, relative to the largest value of the plain model's result."""
GRADIENT = 1e-4
"""Largest difference of an original parameter's gradient at step 0, relative to its largest
value; gradients below a hundredth of the model's largest are measured against that, since those
that are zero but for rounding (biases before a norm) have no scale of their own."""
REFERENCE = 2e-5
"""Largest difference from the reference with perturbed connections, relative as for STEP0."""
FLOOR = 1e-6
"""Each connection's parameters must get gradients above this share of the largest of their kind
(phi, alpha, bias, collapse weight)."""
CACHE_DIFFERS = {
    "GPT-Neo": ("static_cache",),
    "MiniMax": ("beam",),
    "RecurrentGemma": ("beam",),
    "LED": ("static_cache",),
    "FSMT": GENERATE,
    "M2M100": GENERATE,
    "NLLB-MoE": GENERATE,
    "T5Gemma": GENERATE,
}
"""Where the library's plain model itself generates otherwise with a cache than without one (its
own defects: states that beam search does not reorder, positions, windows), so that a rewritten one
can be held to the plain one's tokens at step 0 alone."""
NEW_TOKENS = 5
PAD = 2


def build(entry: Entry, seed: int = 0) -> nn.Module:
    """A model in evaluation mode; norms and biases are not at 1 and 0, gates are not closed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = entry.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and (parameter.dim() == 1 or not parameter.any()):
                    parameter.add_(SPREAD * torch.randn_like(parameter))
    return model


def streams_of(entry: Entry) -> int:
    return 3 + zlib.crc32(entry.name.encode()) % 2


@dataclass
class Case:
    """One architecture: the plain model, and the transformed one once `transform` has run."""

    entry: Entry
    plain: nn.Module
    n: int
    found: list = field(default_factory=list)
    model: nn.Module | None = None
    perturbed: bool = False
    measured: dict[str, float] = field(default_factory=dict)

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        result = self.entry.result(model(**inputs))
        assert result.isfinite().all(), "the model's own result is not finite"
        return result

    def perturb(self) -> nn.Module:
        assert self.model is not None
        if not self.perturbed:
            perturb(self.model, seed=7)
            self.perturbed = True
        return self.model

    def close(self, what: str, got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
        assert got.shape == wanted.shape, what
        scale = float(wanted.detach().abs().max())
        difference = float((got - wanted).detach().abs().max()) / scale
        self.measured[what] = max(difference, self.measured.get(what, 0.0))
        limit = tolerance * self.entry.loose
        assert difference <= limit, f"{what}: differs by {difference:.2g}, allowed {limit:.2g}"


Check = Callable[[Case], None]


def new_case(entry: Entry) -> Case:
    return Case(entry, build(entry), streams_of(entry))


# --- the checks, in order ---------------------------------------------------------------------


def check_sites(case: Case) -> None:
    """As many residual adds a stream as the source code shows, and none refused unless stated."""
    entry = case.entry
    if entry.refused and entry.refused[1] == 0:
        return  # transform says no to the model as a whole
    case.found = found = mc.find_residuals(case.plain, entry.inputs())
    refused = [s for s in found if not s.accepted]
    reasons = "; ".join(sorted({f"{s.source}: {s.reason}" for s in refused}))
    pattern, count = entry.refused or ("", 0)
    assert len(refused) == count, f"{len(refused)} refused, {count} stated: {reasons}"
    assert all(re.search(pattern, s.reason) for s in refused), reasons
    accepted = [s.stream for s in found if s.accepted]
    got = tuple(accepted.count(stream) for stream in sorted(set(accepted)))
    assert got == entry.sites, f"sites {got}, stated {entry.sites}"


def check_refused(case: Case) -> None:
    """Where nothing can be rewritten, the reason is the stated one and the model is as before."""
    assert case.entry.refused is not None
    before = snapshot(case.plain)
    for strict in (True, False):
        with pytest.raises(mc.MHCError, match=case.entry.refused[0]):
            mc.transform(case.plain, example_inputs=case.entry.inputs(), strict=strict)
        assert_unchanged(before, case.plain)


@torch.no_grad()
def check_step0(case: Case) -> None:
    """`transform` keeps the function."""
    inputs = case.entry.inputs()
    wanted = case.run(case.plain, inputs)
    model = mc.transform(
        copy.deepcopy(case.plain), example_inputs=inputs, streams=case.n,
        strict=case.entry.refused is None,
    )  # fmt: skip
    case.close("step 0", case.run(model, inputs), wanted, STEP0)
    case.model = model


@torch.no_grad()
def check_shapes(case: Case) -> None:
    """Another batch size and other lengths than those of the example inputs."""
    for batch, length, seed in [(3, 11, 1), (1, 5, 2)]:
        inputs = case.entry.inputs(batch, length, seed)
        wanted = case.run(case.plain, inputs)
        case.close("shapes", case.run(case.model, inputs), wanted, STEP0)


def fixed_randomness() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # the masks of SpecAugment


def projected_loss(case: Case, model: nn.Module, seed: int) -> torch.Tensor:
    """A random projection: the mean square of a normed result would have no gradient."""
    result = case.run(model, case.entry.inputs(2, 9, seed))
    weight = normal(*result.shape, seed=seed + 50)
    return (result * weight).sum() / result.numel() ** 0.5


def check_gradients(case: Case) -> None:
    """Training mode at step 0: every original parameter's gradient is the plain model's."""
    gradients = []
    for model in (case.plain, case.model):
        model.train()
        model.zero_grad()
        fixed_randomness()
        projected_loss(case, model, 3).backward()
        model.eval()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
        model.zero_grad()
    plain, got = gradients
    top = max(float(g.abs().max()) for g in plain.values() if g is not None and g.numel())
    assert top > 0
    for name, gradient in plain.items():
        assert (gradient is None) == (got[name] is None), name
        if gradient is not None and gradient.numel():
            scale = max(float(gradient.abs().max()), 1e-2 * top)
            difference = float((gradient - got[name]).abs().max()) / scale
            self_limit = GRADIENT * case.entry.loose
            assert difference <= self_limit, f"gradient of {name} differs by {difference:.2g}"
            before = case.measured.get("gradients", 0.0)
            case.measured["gradients"] = max(before, difference)


def check_training(case: Case) -> None:
    """Off the start, every parameter of every connection gets a gradient, and a step is taken."""
    model = case.perturb().train()
    fixed_randomness()
    projected_loss(case, model, 4).backward()
    parameters = dict(mc.mhc_parameters(model))
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name}: gradient is not finite"
    sizes: dict[tuple[str, str], dict[str, float]] = {}
    for name, kind, gradient in gradient_parts(model, parameters):
        kind = kind, name.split(".")[0]  # parts of a model may differ by far
        sizes.setdefault(kind, {})[name] = float(gradient.abs().max())
    for kind, each in sizes.items():
        # A map that nothing reads has a gradient of exactly zero, others may have a small one.
        floor = 0.0 if " " in kind[0] else FLOOR * max(each.values())
        small = [k for k, v in each.items() if v <= floor]
        assert not small, f"gradients of {kind} vanish: {small}"
    before = {k: p.detach().clone() for k, p in parameters.items()}
    try:
        torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-12).step()
        still = [k for k, p in parameters.items() if torch.equal(before[k], p)]
        assert not still, f"the step moved nothing in {still}"
    finally:
        model.load_state_dict({**case.plain.state_dict(), **before}, strict=True)
        model.zero_grad()
        model.eval()


def check_recompute(case: Case) -> None:
    """Streams that the backward of an eager model rebuilds change no bit of a gradient."""
    model = case.perturb().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}  # running statistics change

    def gradients() -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        fixed_randomness()
        projected_loss(case, model, 4).backward()
        return {k: p.grad for k, p in model.named_parameters()}

    kept = gradients()
    try:
        for plan, first in itertools.product((2, "timeline"), (True, False)):
            if first:  # its step measures for the second
                mc.set_recompute(model, plan)
            for name, gradient in gradients().items():
                same = gradient is kept[name] or torch.equal(gradient, kept[name])
                assert same, f"{name}: with recompute={plan!r} its gradient differs"
    finally:
        mc.set_recompute(model, "off")
        model.load_state_dict(before)
        model.zero_grad()
        model.eval()


def gradient_parts(
    model: nn.Module, parameters: dict[str, nn.Parameter]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Gradients by kind; those of phi and bias cut into the maps that they make.

    At the first site of a stream the streams are copies: H_res changes nothing there, and H_pre
    only scales what a norm may scale back. Behind it each map has to have a gradient of its own:
    a sublayer that does not read h = pre(x) has none for H_pre.
    """
    sites = {k: m for k, m in model.named_modules() if isinstance(m, mc.HyperConnection)}
    for name, parameter in parameters.items():
        owner, kind = name.rsplit(".", 1)
        yield name, kind, parameter.grad
        site = sites.get(owner)
        if site is not None and kind in ("phi", "bias") and site.index > 0:
            n = site.streams
            parts = parameter.grad.split([n, n, n * n], -1)
            for part, gradient in zip(("pre", "post", "res"), parts, strict=True):
                yield name, f"{kind} {part}", gradient


@torch.no_grad()
def check_reference(case: Case) -> None:
    """With perturbed connections: equal to the plain model run on n streams, see lockstep.py."""
    model = case.perturb()
    inputs = reference_inputs(case)
    got = case.run(model, inputs)
    case.close("reference", got, reference_of(case), REFERENCE)
    plain = case.run(case.plain, inputs)
    moved = float((got - plain).abs().max() / plain.abs().max())
    assert moved > 1e-3, f"the perturbed model is still the plain one (to {moved:.2g})"


def reference_inputs(case: Case) -> dict[str, Any]:
    return case.entry.inputs(2, 7, 5)


def reference_of(case: Case) -> torch.Tensor:
    inputs = reference_inputs(case)
    out = reference_result(case.plain, case.model, case.found, inputs, case.n)
    return case.entry.result(out)


# --- generate() ---------------------------------------------------------------------------------


def prompt(case: Case, way: str, seed: int) -> dict[str, Any]:
    inputs = {
        k: v for k, v in case.entry.inputs(2, 7, seed).items() if not k.startswith("decoder_")
    }
    if "input_ids" not in inputs:
        return inputs
    ids = inputs["input_ids"].clone()
    mask = torch.ones_like(ids)
    if way == "left_padding":
        ids[0, :3], mask[0, :3] = PAD, 0
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def generate(case: Case, model: nn.Module, way: str, seed: int, cache: bool = True) -> Any:
    kwargs: dict[str, Any] = {"use_cache": cache}
    if way == "beam":
        kwargs["num_beams"] = 3
    if way == "static_cache" and cache:
        kwargs.update(cache_implementation="static", disable_compile=True)
    return model.generate(
        **prompt(case, way, seed), **kwargs, do_sample=False, min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS, pad_token_id=PAD, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip


def same_generation(case: Case, what: str, got: Any, wanted: Any, tolerance: float) -> None:
    assert torch.equal(got.sequences, wanted.sequences), f"{what}: other tokens"
    case.close(what, torch.stack(got.logits), torch.stack(wanted.logits), tolerance)


def check_generate(case: Case, way: str) -> None:
    """At step 0 as the plain model, with the cache."""
    wanted, got = (generate(case, m, way, 8) for m in (case.plain, case.model))
    same_generation(case, f"generate {way}", got, wanted, STEP0)


def check_cache(case: Case, way: str) -> None:
    """With perturbed connections: with the cache as without it."""
    model = case.perturb()
    got, wanted = (generate(case, model, way, 9, cache) for cache in (True, False))
    same_generation(case, f"cache {way}", got, wanted, REFERENCE)


def check_library_differs(case: Case, way: str) -> None:
    """The plain model is rightly listed in CACHE_DIFFERS."""
    got, wanted = (generate(case, case.plain, way, 9, cache) for cache in (True, False))
    with pytest.raises(AssertionError):
        same_generation(case, "plain", got, wanted, 10 * REFERENCE)
    case.measured.pop("plain", None)
