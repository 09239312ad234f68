"""A backward in two parts has the gradients of one, and nothing in it runs twice."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from mhc_compile.pipeline.split_backward import backward_inputs
from mhc_compile.runtime.recompute import recompute


class Doubled(torch.autograd.Function):
    """x * weight.sum() in Python; counts its backwards."""

    runs = 0

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight.sum()

    @staticmethod
    def backward(ctx, gradient):
        Doubled.runs += 1
        x, weight = ctx.saved_tensors
        return gradient * weight.sum(), (gradient * x).sum() * torch.ones_like(weight)


class Net(nn.Module):
    """Weights of all kinds: plain, behind a cast, in Python, used twice, beside the path."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.python, self.twice = nn.Parameter(torch.rand(3)), nn.Parameter(torch.randn(6, 6))
        self.beside, self.unused = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        x = x + self.first(self.norm(x)).tanh() @ self.twice
        x = Doubled.apply(x, self.python)
        x = x + nn.functional.linear(x.half(), self.second.weight.half()).float()
        return x @ self.twice + self.beside.exp()


def reference(net, x, gradient):
    net.zero_grad()
    x = x.clone().requires_grad_()
    net(x).backward(gradient)
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return x.grad, found


CALLS = {
    "plain": lambda net, x: net(x),
    "recompute": lambda net, x: recompute(net, x),
    "checkpoint": lambda net, x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gradients(call):
    net, x, gradient = Net(), torch.randn(4, 6), torch.randn(4, 6)
    wanted, weights = reference(net, x, gradient)
    x.requires_grad_()
    Doubled.runs = 0
    (found,), work = backward_inputs([call(net, x)], [gradient], [x], net.parameters())
    torch.testing.assert_close(found, wanted)
    assert net.second.weight.grad is None and net.norm.weight.grad is None  # of the second part
    assert net.python.grad is not None and net.twice.grad is not None  # cannot wait
    work.run()
    assert Doubled.runs == 1
    for name, parameter in net.named_parameters():
        if name in weights:
            torch.testing.assert_close(parameter.grad, weights[name])
    assert net.unused.grad is None and net.second.bias.grad is None


def test_gradients_add_up_over_chunks():
    net, chunks = Net(), [torch.randn(4, 6) for _ in range(3)]
    wanted = {}
    for x in chunks:
        for name, gradient in reference(net, x, torch.ones(4, 6))[1].items():
            wanted[name] = wanted.get(name, 0) + gradient
    works = [
        backward_inputs([net(x.requires_grad_())], [torch.ones(4, 6)], [x], net.parameters())[1]
        for x in chunks
    ]
    for work in works:
        work.run()
    for name, gradient in wanted.items():
        torch.testing.assert_close(net.get_parameter(name).grad, gradient)


def test_recompute_runs_once_and_a_checkpoint_more_often():
    counts = {}
    for name, call in CALLS.items():
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        runs = []
        net[0].register_forward_hook(lambda *_, runs=runs: runs.append(1))
        x = torch.randn(2, 6, requires_grad=True)
        _, work = backward_inputs([call(net, x)], [torch.ones(2, 6)], [x], net.parameters())
        work.run()
        counts[name] = len(runs)
    assert counts["plain"] == 1 and counts["recompute"] == 2
    assert counts["checkpoint"] > 2  # what split_stages refuses


def test_a_compiled_function_runs_its_backward_once():
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), torch.randn(2, 6)
    wanted, weights = reference(net, x, torch.ones(2, 6))
    x.requires_grad_()
    compiled = torch.compile(net, backend="aot_eager")
    (found,), work = backward_inputs([compiled(x)], [torch.ones(2, 6)], [x], net.parameters())
    assert not work.roots  # all of it ran: no graph is kept, buffers may be donated
    torch.testing.assert_close(found, wanted)
    for name, gradient in weights.items():
        torch.testing.assert_close(net.get_parameter(name).grad, gradient)


def test_losses_several_results_and_none():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    y = torch.arange(3)
    results = [layer(x), x * 2, torch.arange(3)]
    found, work = backward_inputs(
        results, [torch.ones(3, 4), None, None], [x, y], layer.parameters()
    )
    assert found[1] is None
    torch.testing.assert_close(found[0], torch.ones(3, 4) @ layer.weight)
    work.run()
    assert layer.weight.grad is not None
    assert backward_inputs([torch.ones(3)], [None], [y], layer.parameters())[0] == (None,)
    loss = layer(x).square().mean()
    assert backward_inputs([loss], [None], [x], layer.parameters())[0][0] is not None
