"""Merges after MLPs on a stream of high priority: kernels of forwards alone, the same bits."""

import pytest
import torch
from fake_streams import fake_streams
from models import Block, NanoGPT, perturb, tokens

import mhc_compile as mc
from mhc_compile.runtime.high_priority import high_priority
from mhc_compile.runtime.recompute import recompute

OWN, HIGH = "post_res on own", "post_res on high"


def build():
    model = mc.transform(NanoGPT(depth=2), streams=4, example_inputs={"idx": tokens()})
    return perturb(model).train()


def results(model):
    model.zero_grad()
    out = model(tokens())
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def test_what_waits_for_what():
    model = build()
    wanted = results(model)
    with fake_streams() as (stream, log):
        with high_priority(stream):
            out = model(tokens())
        forward = list(log)
        model.zero_grad()
        out.square().mean().backward()
    after_mlp = ["high waits for own", HIGH, "own waits for high", "memory kept for own"]
    assert forward == 2 * [OWN, *after_mlp]
    assert log[len(forward) :] == 4 * ["post_res_backward on own"]
    got = [out.detach(), *(p.grad for p in model.parameters())]
    assert all(map(torch.equal, got, wanted))


def test_nothing_is_offered():
    model = build()
    with fake_streams() as (_, log), high_priority(None):
        results(model)
    assert log == 4 * [OWN] + 4 * ["post_res_backward on own"]


def test_what_is_recomputed_stays():
    model = build()
    with fake_streams() as (stream, log):
        with high_priority(stream):
            out = recompute(model, tokens())
        assert [line for line in log if "post_res" in line] == 2 * [OWN, HIGH]
        log.clear()
        out.square().mean().backward()
    assert log == 4 * [OWN] + 4 * ["post_res_backward on own"]


def test_an_error_takes_the_offer_back():
    model = build()
    with fake_streams() as (stream, log):
        with pytest.raises(TypeError), high_priority(stream):
            model()
        with high_priority(stream):
            with high_priority(None):
                model(tokens())
        model(tokens())
    assert log == 8 * [OWN]


def test_compiled_graphs_do_not_take_it():
    torch.compiler.reset()
    block = Block()
    x = torch.randn(2, 6, 32)
    model = mc.transform(torch.nn.Sequential(block, Block()), streams=2, example_inputs=(x,))
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with fake_streams() as (stream, log), high_priority(stream), torch.no_grad():
        out = call(x)
    assert log == 4 * [OWN]
    torch.testing.assert_close(out, model(x))
