"""overlap=True: ops are tagged, forwards cut at their servers, and the results stay the same."""

import copy

import pytest
import torch
import torch.distributed as dist
from models import perturb
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import mhc_compile as mc
from mhc_compile.backend.records import Piece, last_record
from mhc_compile.backend.run_pieces import cut
from mhc_compile.backend.tag_ops import OP, SERVER, tag_ops

C = 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dropout=0.0, moved=False):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.dropout, self.moved = nn.Dropout(dropout), moved

    def forward(self, x):
        h = self.norm(x)
        if self.moved:
            h = collectives.all_to_all_single_autograd(
                h.flatten(0, 1), None, None, dist.group.WORLD
            )
        h = self.dropout(self.down(F.gelu(self.up(h))))
        if self.moved:
            h = collectives.all_to_all_single_autograd(h, None, None, dist.group.WORLD)
        return h.view_as(x)


class Model(nn.Module):
    def __init__(self, blocks=2, **options):
        super().__init__()
        self.embed, self.head = nn.Linear(C, C), nn.Linear(C, C)
        self.layers = nn.ModuleList(
            layer for _ in range(blocks) for layer in (Attention(), MLP(**options))
        )

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def build(streams=4, **options):
    torch.compiler.reset()
    model, x = Model(**options), torch.randn(2, 6, C)
    return perturb(mc.transform(model, streams=streams, example_inputs=(x,))), x


def results(model, call, x):
    model.zero_grad()
    torch.manual_seed(5)
    out = call(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def pieces(direction):
    return [(piece.server, piece.ops) for piece in last_record().pieces[direction]]


@pytest.mark.parametrize(
    ("lower", "recompute"),
    [("aot_eager", "off"), ("aot_eager", "paper"), ("inductor", "paper"),
     pytest.param("inductor", "off", marks=pytest.mark.long)],
)  # fmt: skip
def test_same_bits_as_in_one_piece(lower, recompute):
    model, x = build(dropout=0.1 if lower == "aot_eager" else 0.0)
    options = {"lower": lower, "recompute": recompute}
    whole = results(model, torch.compile(model, backend="mhc", options=options), x)
    torch.compiler.reset()
    call = torch.compile(model, backend="mhc", options=options | {"overlap": True})
    apart = results(model, call, x)
    assert all(map(torch.equal, whole, apart))
    report = mc.report(call)
    assert "forward 5 (2 apart), backward 1 (0 apart)" in str(report)
    assert '"server": "hp"' in report.to_json()


def test_pieces_of_a_model():
    model, x = build()
    call = torch.compile(model, backend="mhc", options={"overlap": True, "lower": "aot_eager"})
    results(model, call, x)
    first = ("before", "0.read", "0.attention", "0.seam", "1.mlp")
    assert pieces("forward") == [
        ("compute", first), ("hp", ("1.seam",)), ("compute", ("2.attention", "2.seam", "3.mlp")),
        ("hp", ("3.post_res",)), ("compute", ("3.after",)),
    ]  # fmt: skip
    forward = last_record().pieces["forward"]
    assert [piece.after[-1:] for piece in forward] == [(), (0,), (1,), (2,), (3,)]
    ((server, ops),) = pieces("backward")
    assert server == "compute" and set(ops) == {op for piece in forward for op in piece.ops}


def test_checkpointed_sublayers_are_looked_into():
    class Checkpointed(Model):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=False)
            return self.head(x)

    torch.compiler.reset()
    x = torch.randn(2, 6, C)
    model = perturb(mc.transform(Checkpointed(), streams=4, example_inputs=(x,)))
    options = {"lower": "aot_eager", "recompute": "off"}
    whole = results(model, torch.compile(model, backend="mhc", options=options), x)
    torch.compiler.reset()
    options["overlap"] = True
    apart = results(model, torch.compile(model, backend="mhc", options=options), x)
    assert all(map(torch.equal, whole, apart))
    hp = [ops for server, ops in pieces("forward") if server == "hp"]
    assert hp == [("1.seam",), ("3.post_res",)]


@pytest.mark.parametrize("fuse", [True, False])
def test_sublayers_are_told_apart_without_fusion_too(fuse):
    model, x = build()
    options = {"overlap": True, "lower": "aot_eager", "fuse": fuse}
    results(model, torch.compile(model, backend="mhc", options=options), x)
    found = pieces("forward")
    hp = [ops for server, ops in found if server == "hp"]
    assert hp == [("1.seam" if fuse else "1.post_res",), ("3.post_res",)]


def test_lengths_may_vary():
    model, x = build()
    options = {"overlap": True, "lower": "aot_eager"}
    call = torch.compile(model, backend="mhc", options=options, dynamic=True)
    exact = copy.deepcopy(model).double()
    for length in (6, 9, 5):
        x = torch.randn(2, length, C)
        pairs = zip(results(model, call, x), results(exact, exact, x.double()), strict=True)
        for got, want in pairs:
            assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_without_gradients_and_without_connections():
    model, x = build()
    call = torch.compile(model, backend="mhc", options={"overlap": True, "lower": "aot_eager"})
    with torch.no_grad():
        torch.testing.assert_close(call(x), model(x))
    plain = nn.Linear(C, C)
    call = torch.compile(plain, backend="mhc", options={"overlap": True, "lower": "aot_eager"})
    assert torch.equal(call(x), plain(x))
    assert pieces("forward") == [("compute", ("before",))]


def test_all_to_alls_are_apart_in_both_directions():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model, x = build(moved=True)
        options = {"overlap": True, "lower": "aot_eager"}
        results(model, torch.compile(model, backend="mhc", options=options), x)
    finally:
        dist.destroy_process_group()
    apart = [(server, ops[0]) for server, ops in pieces("forward") if server != "compute"]
    assert apart == [
        ("a2a", "1.dispatch"), ("a2a", "1.combine"), ("hp", "1.seam"),
        ("a2a", "3.dispatch"), ("a2a", "3.combine"), ("hp", "3.post_res"),
    ]  # fmt: skip
    found = pieces("backward")
    assert [server for server, _ in found] == 4 * ["compute", "a2a"] + ["compute"]
    back = [ops for server, ops in found if server == "a2a"]
    assert back == [("3.combine",), ("3.dispatch",), ("1.combine",), ("1.dispatch",)]


def test_untagged_calls_go_with_the_call_before():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.sin, (x,))
    b = graph.call_function(torch.cos, (a,))
    graph.output(graph.call_function(torch.add, (a, b)))
    b.meta["custom"] = {OP: "1.seam", SERVER: "hp", "other": 3}
    whole, found = cut(torch.fx.GraphModule({}, graph))
    assert found == [Piece("compute", ()), Piece("hp", ("1.seam",), (0,))]
    value = torch.randn(3)
    assert torch.equal(whole(value), value.sin() + value.sin().cos())


@pytest.mark.parametrize(
    ("finish", "kind"),
    [(lambda w, v: F.dropout(w.to(v.dtype), 0.1) @ v, "attention"),
     (lambda w, v: w.topk(2, -1).values.sum(-1, keepdim=True) * v, "mlp"),
     (lambda w, v: torch.einsum("ij,jk->ik", w, v), "attention")],
)  # fmt: skip
def test_a_routers_softmax_is_no_attention(finish, kind):
    class Layer(nn.Module):
        def forward(self, x):
            weights = (x[0] @ x[0].T).softmax(-1)
            return finish(weights, x[0]).expand_as(x)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = Layer(), MLP()

        def forward(self, x):
            x = x + self.layer(x)
            return x + self.other(x)

    torch.compiler.reset()
    model, x = Plain(), torch.randn(2, 6, C)
    mc.transform(model, streams=2, example_inputs=(x,))
    call = torch.compile(model, backend="mhc", options={"overlap": True, "lower": "aot_eager"})
    call(x)
    tags = {op for _, ops in pieces("forward") for op in ops}
    assert f"0.{kind}" in tags and "1.mlp" in tags


def test_tags_of_others_stay():
    graph = torch.fx.Graph()
    call = graph.call_function(torch.sin, (graph.placeholder("x"),))
    call.meta["custom"] = given = {"mine": 1}
    graph.output(call)
    tag_ops(graph)
    assert call.meta["custom"] == {"mine": 1, OP: "before", SERVER: "compute"}
    assert given == {"mine": 1}
