"""`recompute`: gradients, random numbers and autocast as without, one repetition."""

import pytest
import torch
from torch import nn

import mhc_compile as mc
from mhc_compile.runtime.recompute import noted_calls, recompute, run_last_ahead


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop, self.runs = nn.Linear(8, 8), nn.Dropout(0.5), 0

    def forward(self, x, *, scale):
        self.runs += 1
        return {"y": self.drop(self.layer(x["a"][0])).tanh() * scale["s"]}


def gradients(call, net, x, scale):
    net.zero_grad()
    x.grad = scale.grad = None
    torch.manual_seed(3)
    y = call(net, {"a": (x,)}, scale={"s": scale})["y"]
    torch.rand(7)  # other random numbers in between
    y.square().sum().backward()
    return y.detach(), x.grad, scale.grad, net.layer.weight.grad


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["", "autocast"])
def test_same_as_without(dtype):
    net = Counted()
    x, scale = torch.randn(4, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        torch.manual_seed(3)
        plain = net({"a": (x,)}, scale={"s": scale})["y"]
    torch.rand(7)
    plain.square().sum().backward()
    wanted = [plain.detach(), x.grad, scale.grad, net.layer.weight.grad]
    net.zero_grad()
    x.grad = scale.grad = None
    net.runs = 0
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        torch.manual_seed(3)
        y = recompute(net, {"a": (x,)}, scale={"s": scale})["y"]
    state = torch.get_rng_state()
    y.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert net.runs == 2
    for a, b in zip(wanted, [y.detach(), x.grad, scale.grad, net.layer.weight.grad], strict=True):
        assert torch.equal(a, b)


def test_the_last_call_runs_ahead():
    nets, x = [Counted() for _ in range(2)], torch.randn(4, 8, requires_grad=True)
    scale = {"s": torch.rand(8)}
    torch.manual_seed(3)
    wanted = x
    for net in nets:
        wanted = net({"a": (wanted,)}, scale=scale)["y"]
    (right,) = torch.autograd.grad(wanted.square().sum(), x)
    torch.manual_seed(3)
    y = x
    with noted_calls() as calls:
        for net in nets:
            y = recompute(net, {"a": (y,)}, scale=scale)["y"]
    assert len(calls) == 2
    for _ in range(2):  # a second time there is nothing to do
        run_last_ahead(calls)
        assert [net.runs for net in nets] == [2, 3]
    torch.rand(3)
    y.square().sum().backward()
    assert [net.runs for net in nets] == [3, 3] and torch.equal(x.grad, right)
    del y
    run_last_ahead(calls)  # nor where the graph is gone, or nothing was called
    run_last_ahead([])
    assert [net.runs for net in nets] == [3, 3] and calls[-1]() is None


def test_calls_are_noted_inside_alone():
    net, x = Counted(), torch.randn(4, 8, requires_grad=True)
    with noted_calls() as calls:
        pass
    recompute(net, {"a": (x,)}, scale={"s": torch.ones(8)})
    assert calls == []


def test_it_keeps_its_arguments_alone():
    kept = []
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
    x = torch.randn(16, 8, requires_grad=True)

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = recompute(layers, x)
        assert not kept
        layers(x)
        assert kept
    y.sum().backward()


def test_without_gradients_nothing_is_kept():
    net = Counted()
    with torch.no_grad():
        y = recompute(net, {"a": (torch.randn(2, 8),)}, scale={"s": torch.ones(8)})["y"]
    assert not y.requires_grad and net.runs == 1


def test_another_run_is_refused():
    flips = iter([True, False])

    def changing(x):
        return x.tanh() if next(flips) else x.tanh().exp().sin()

    y = recompute(changing, torch.randn(3, requires_grad=True))
    with pytest.raises(mc.MHCError, match="saved 1 tensors for its backward and 3 others"):
        y.sum().backward()


def test_inside_a_compiled_function():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8, requires_grad=True)
    compiled = torch.compile(lambda x: recompute(net, x), backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    found = x.grad.clone()
    x.grad = None
    net(x).sum().backward()
    torch.testing.assert_close(found, x.grad)
