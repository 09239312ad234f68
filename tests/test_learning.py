"""A start that keeps the function and still learns: the streams part and every gate moves."""

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, VOCABULARY, logits, perturb, tokens
from torch import nn

import mhc_compile as mc
from mhc_compile.runtime.modules import StreamCollapse

STEPS = 20
# Rounding alone leaves equal streams about 1e-7 apart, so 1e-5 is a wide margin for "equal" and
# ten times that can only come from learning: alpha and the res bias move by up to 0.06 in twenty
# steps of 3e-3, and streams written to in unequal parts then differ by 1e-3 and more.
DIVERGED, EQUAL = 1e-4, 1e-5
# float32 gradients of a loss near 4 carry noise of about 1e-8.
NOTICED = 1e-6
MODELS = ["nanogpt", "gpt2"]


def train(name, make_symmetric=False, seed=0, **overrides):
    """Twenty AdamW steps on random tokens.

    Returns:
        The divergence ||x_i - mean|| / ||mean|| of the streams before the collapse, first and
        last, the largest gradient entry that each connection's parameter saw, and the losses.
    """
    architecture = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = mc.transform(
        architecture.build(seed=1), example_inputs=architecture.inputs(), **overrides
    )
    if make_symmetric:
        symmetrise(model)
    divergence, gradients, losses = [], {}, []

    def measure(_, args):
        x = args[0].detach()
        mean = x.mean(-2, keepdim=True)
        distances = [(x[..., i : i + 1, :] - mean).norm() for i in range(x.shape[-2])]
        divergence.append(float(max(distances) / mean.norm()))

    collapses = [m for m in model.modules() if isinstance(m, StreamCollapse)]
    assert len(collapses) == 1
    collapses[0].register_forward_pre_hook(measure)
    model.train()
    own = dict(mc.mhc_parameters(model))
    rest = [p for k, p in model.named_parameters() if k not in own]
    groups = [{"params": rest}, {"params": list(own.values()), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    main = next(iter(architecture.inputs()))
    for step in range(STEPS):
        ids = tokens(4, 12, seed=step)
        out = logits(model, {main: ids})
        loss = F.cross_entropy(out[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        for key, p in own.items():
            if p.grad is not None:
                gradients[key] = max(gradients.get(key, 0.0), float(p.grad.abs().max()))
        optimizer.step()
        losses.append(float(loss.detach()))
    missing = own.keys() - gradients.keys()
    assert not missing, f"no gradient at all: {sorted(missing)}"
    return divergence, gradients, losses


@torch.no_grad()
def symmetrise(model):
    """Equal pre gates, phi = 0 and equal collapse weights: nothing tells the streams apart."""
    for module in model.modules():
        if isinstance(module, mc.HyperConnection):
            n = module.streams
            module.phi.zero_()
            module.bias[:n] = torch.logit(torch.tensor(1 / n))
        elif isinstance(module, StreamCollapse):
            module.weight.fill_(1 / module.weight.numel())


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_streams_part(name, n):
    divergence, _, losses = train(name, streams=n)
    assert divergence[0] <= EQUAL  # copies at the start
    assert divergence[-1] > DIVERGED
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_symmetric_start_keeps_the_streams_equal(name):
    """The control: without unequal gates the measure above stays at rounding."""
    divergence, _, losses = train(name, make_symmetric=True)
    assert divergence[-1] <= EQUAL
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("connection", ["mhc", "hc"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name, connection):
    _, gradients, _ = train(name, connection=connection)
    silent = {key: value for key, value in gradients.items() if not value > NOTICED}
    assert not silent


def test_the_last_res_map_learns_only_behind_unequal_collapse_weights():
    """Columns of a doubly stochastic matrix sum to 1, so a mean does not see it."""

    def last_res(**overrides):
        overrides = {"streams": 3, "sinkhorn_iters": 100, **overrides}
        torch.manual_seed(2)
        model = mc.transform(ARCHITECTURES["nanogpt"].build(seed=2), **overrides).double()
        last = model.h[1].mhc["1"]
        perturb(model)  # streams that differ: mixing equal ones does nothing
        with torch.no_grad():  # from flat logits the iterations converge fast
            last.bias[6:] = 0
        ids = tokens(2, 8, seed=3)
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        return float(last.bias.grad[6:].abs().max())

    assert last_res(collapse="mean") < 1e-9
    assert last_res(collapse="learned") > 1e-4
    assert last_res(collapse="head") > 1e-4


def test_phi_is_random_and_alpha_is_zero():
    model = mc.transform(ARCHITECTURES["nanogpt"].build())
    connections = [m for m in model.modules() if isinstance(m, mc.HyperConnection)]
    assert len(connections) == 4
    for connection in connections:
        assert connection.alpha.abs().max() == 0
        assert 0.5 < connection.phi.std() * connection.phi.shape[0] ** 0.5 < 2
    first, second = connections[:2]
    assert not torch.equal(first.phi, second.phi)
    assert first.bias[:4].argmax() != second.bias[:4].argmax()


def test_mhc_parameters_suit_an_optimizer_group():
    model: nn.Module = mc.transform(ARCHITECTURES["nanogpt"].build())
    own = [p for _, p in mc.mhc_parameters(model)]
    known = {id(p) for p in own}
    rest = [p for p in model.parameters() if id(p) not in known]
    # AdamW refuses parameters that stand in two groups.
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": own, "weight_decay": 0}])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
