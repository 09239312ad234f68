"""The recompute plan is what the backward does: kept, rebuilt, equal bit by bit."""

import json
import warnings

import pytest
import torch
from test_passes import C, N, Sublayers
from torch.nn import functional as F

import mhc_compile as mc
from mhc_compile.backend import lowerings, mhc
from mhc_compile.backend import recompute as module
from mhc_compile.backend.check_graph import count_operators
from mhc_compile.backend.graph_nodes import arguments, mhc_op
from mhc_compile.backend.options import parse_options
from mhc_compile.backend.recompute import Recompute
from mhc_compile.backend.records import GraphRecord, last_record

L = 7


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(TensorFloat32|torch.jit|dynamo_pgo).*")
        yield
    torch.compiler.reset()


def gradients(call, model, x, seed=3):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out = call(leaf)
    whole = sum(out) if isinstance(out, tuple) else out
    (whole * torch.linspace(-1, 1, whole.numel()).view(whole.shape).cos()).sum().backward()
    return [
        whole.detach(),
        leaf.grad,
        *(p.grad.clone() for p in model.parameters() if p.grad is not None),
    ]


def run(model, x, recompute, lower, **options):
    torch.compiler.reset()
    options = {"lower": lower, "recompute": recompute, **options}
    return gradients(torch.compile(model, backend=mhc, fullgraph=True, options=options), model, x)


def states_kept(monkeypatch):
    """Notes how many n-stream tensors each forward graph hands to its backward."""
    kept, verify = [], Recompute.verify

    def note(self, graph):
        verify(self, graph)
        if not any("tangents" in str(node.target) for node in graph.nodes):
            values = [n.meta["val"] for n in graph.output_node().args[0] if hasattr(n, "meta")]
            shapes = [tuple(v.shape[-2:]) for v in values if isinstance(v, torch.Tensor)]
            kept.append(shapes.count((N, C)))

    monkeypatch.setattr(Recompute, "verify", note)
    return kept


PLANS = [(1, 0), (3, 4), ((2, 2, 3), 4), (L, L - 1), ("paper", None), ("timeline", None)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_gradients_are_bitwise_equal(plan, monkeypatch):
    recompute, rebuilt = plan
    model, x = Sublayers(L), torch.randn(2, 5, C)
    wanted = run(model, x, "off", "aot_eager")
    kept = states_kept(monkeypatch)
    got = run(model, x, recompute, "aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    record = last_record()
    (blocks,) = record.blocks
    assert sum(blocks) == L and record.rebuilt == L - len(blocks)
    assert rebuilt is None or record.rebuilt == rebuilt
    # x_0 is rebuilt from what was expanded.
    assert kept[0] == len(blocks) - 1
    assert record.notes == []


def test_inductor_calls_the_operators(monkeypatch):
    """As it does where kernels run them; it has its own notes of their arguments."""
    monkeypatch.setattr(lowerings, "choose_kernels", lambda gm, record: "operators")
    model, x = Sublayers(L), torch.randn(2, 5, C)
    wanted = run(model, x, "off", "aot_eager")
    with torch._inductor.config.patch(force_disable_caches=True):
        seen = operators_of(monkeypatch)
        got = run(model, x, 3, "inductor")
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    _, (_, made) = seen
    assert made > 0


@pytest.mark.parametrize("recompute", [3, "paper"])
def test_inductor(recompute, monkeypatch):
    model, x = Sublayers(L), torch.randn(2, 5, C)
    wanted = run(model, x, "off", "inductor")
    with torch._inductor.config.patch(force_disable_caches=True):  # else no graph is seen
        kept = states_kept(monkeypatch)
        got = run(model, x, recompute, "inductor")
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    record = last_record()
    assert record.rebuilt == L - len(record.blocks[0]) > 0
    assert kept[0] == len(record.blocks[0]) - 1


class DropsOut(Sublayers):
    def sublayer(self, k, h):
        return F.dropout(super().sublayer(k, h), 0.3)


class ReadsAState(Sublayers):
    """An auxiliary result from the middle of a block."""

    def forward(self, x):
        x = mc.expand_streams(x, N)
        seen = 0.0
        for k, connection in enumerate(self.connections):
            h, state = connection.pre(x)
            x = connection.post(x, self.sublayer(k, h), state)
            if k == 2:
                seen = x.square().mean(-2)
        return mc.collapse_streams(x, self.weights), seen


@pytest.mark.parametrize("kind", [DropsOut, ReadsAState])
def test_dropout_and_readers_of_states(kind):
    model, x = kind(L), torch.randn(2, 5, C)
    wanted = run(model, x, "off", "aot_eager")
    got = run(model, x, 4, "aot_eager")
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    assert last_record().rebuilt == 5


class Doubles(Sublayers):
    def sublayer(self, k, h):
        return 2 * h


class Gated(Sublayers):
    """The gradient of its input, and so of the streams, depends on the input."""

    def sublayer(self, k, h):
        return super().sublayer(k, h) * h.view(-1, C).view(h.shape)


def operators_of(monkeypatch):
    """Notes the operators of each graph, and how many backwards of seams make h too."""
    seen, verify = [], Recompute.verify

    def note(self, graph):
        verify(self, graph)
        calls = [arguments(node) for node in graph.nodes if mhc_op(node) == "seam_backward"]
        seen.append((count_operators(graph), sum(call[-1] for call in calls)))

    monkeypatch.setattr(Recompute, "verify", note)
    return seen


@pytest.mark.parametrize("kind", [Sublayers, Doubles, Gated])
def test_inputs_come_with_the_gradients_of_streams(kind, monkeypatch):
    """Unless those depend on them; where none is read, none is made."""
    model, x = kind(L), torch.randn(2, 5, C)
    wanted = run(model, x, "off", "aot_eager")
    seen = operators_of(monkeypatch)
    got = run(model, x, (4, 1, 2), "aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    (forward, made_ahead), (backward, made) = seen
    assert not forward["post_res"] and not forward["pre_norm"] and not made_ahead
    assert backward["post_res"] == last_record().rebuilt == 4
    assert made + backward["pre_norm"] == (0 if kind is Doubles else L - 1)
    assert (made > 0) == (kind is Sublayers)


class Wide(Sublayers):
    """What is multiplied for a weight's gradient is twice as wide as the input."""

    def __init__(self, count):
        super().__init__(count)
        self.linears = torch.nn.ModuleList(torch.nn.Linear(C, 2 * C) for _ in range(count))

    def sublayer(self, k, h):
        return super().sublayer(k, h).unflatten(-1, (2, C)).sum(-2)


@pytest.mark.parametrize("kind", [Sublayers, Wide])
@pytest.mark.parametrize("recompute", ["paper", "timeline", 2, L])
def test_inputs_that_come_late_do_not_raise_the_peak(kind, recompute, monkeypatch):
    model, x = kind(L), torch.randn(2, 5, C)
    run(model, x, recompute, "aot_eager")
    late = last_record().static_peak
    monkeypatch.setattr(module, "make_inputs_late", lambda *args: None)
    run(model, x, recompute, "aot_eager")
    assert 0 < late <= last_record().static_peak


class Forks(Sublayers):
    """The first merge is written twice, which AOTAutograd makes one; each is read otherwise."""

    def __init__(self):
        super().__init__(5)
        self.head = torch.nn.Linear(C, 64 * C)  # where the peak is

    def forward(self, x):
        x = mc.expand_streams(x, N)
        h, state = self.connections[0].pre(x)
        f, results = self.sublayer(0, h), 0.0
        for first in (1, 3):
            y = self.connections[0].post(x, f, state)
            for k in (first, first + 1):
                h, own = self.connections[k].pre(y)
                y = self.connections[k].post(y, self.sublayer(k, h), own)
            results = results + self.head(mc.collapse_streams(y, self.weights)).square()
        return results


class Rounds(torch.autograd.Function):
    """A product whose backward draws noise for the weight's gradient, then for the input's."""

    @staticmethod
    def forward(ctx, h, weight):
        ctx.save_for_backward(h, weight)
        return h @ weight

    @staticmethod
    def backward(ctx, g):
        h, weight = ctx.saved_tensors
        g_weight = h.flatten(0, -2).t() @ g.flatten(0, -2)
        g_weight = g_weight * (1 + torch.rand_like(g_weight))
        g_h = g @ weight.t()
        return g_h * (1 + torch.rand_like(g_h)), g_weight


class Rounded(Sublayers):
    def sublayer(self, k, h):
        return Rounds.apply(h, self.linears[k].weight)

    def forward(self, x):
        return super().forward(x).repeat(1, 1, 64).square()


@pytest.mark.parametrize("kind", [Forks, lambda: Rounded(4)])
def test_what_is_late_is_the_same_input_and_draws_the_same_numbers(kind):
    model, x = kind(), torch.randn(2, 50, C)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*of 2 sublayers' streams are rebuilt")
        got = run(model, x, 2, "aot_eager")
    for a, b in zip(got, run(model, x, "off", "aot_eager"), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_inputs_do_not_wait_for_their_block():
    """One block of many sublayers: with all inputs made ahead nothing would be saved."""
    model, x, peaks = Sublayers(24), torch.randn(2, 5, C), {}
    for recompute in ("off", 24):
        run(model, x, recompute, "aot_eager")
        peaks[recompute] = last_record().static_peak
    unit = 2 * 5 * C * x.element_size()
    assert peaks[24] <= peaks["off"] - 20 * unit


def test_a_plan_changes_what_runs():
    """In one process, with Inductor's caches on."""
    model, x = Sublayers(4), torch.randn(2, 5, C)
    seen = []
    for recompute in (4, 2, 4, "off"):
        run(model, x, recompute, "aot_eager")
        seen.append(last_record().rebuilt)
    assert seen == [3, 2, 3, 0]


def test_models_without_seams_say_so():
    from test_passes import PostNorm

    model, x = PostNorm(2), torch.randn(2, 5, C)
    with pytest.warns(UserWarning, match="no seams were fused"):
        run(model, x, "paper", "aot_eager")


def test_report():
    model, x = Sublayers(4), torch.randn(2, 5, C)
    run(model, x, (3, 1), "aot_eager")
    report = mc.report(model)
    assert "2 of 4, blocks (3, 1)" in str(report) and "given" in str(report)
    use = report.memory
    assert use.plans[0][0] == "graph 0, stream 0" and use.measured is None
    assert use.predicted == use.plans[0][1].memory.peak > 0
    assert f"static {use.static[0] / 2**20:.1f} MiB" in str(report)
    assert "measured not measured" in str(report)
    assert json.loads(report.to_json())["memory"]["plans"][0]["plan"]["block_sizes"] == [3, 1]


def test_paper_is_the_default_and_silent_where_it_cannot_be():
    from test_passes import PostNorm

    torch._dynamo.reset()
    model, x = Sublayers(L), torch.randn(2, 5, C)
    gradients(torch.compile(model, backend=mhc, options={"lower": "aot_eager"}), model, x)
    assert last_record().choices[0].plan.objective == "paper" and last_record().rebuilt > 0
    model = PostNorm(2)
    for options in ({"lower": "aot_eager"}, {"lower": "eager"}, {"fuse": False}):
        options = {"lower": "aot_eager", **options}
        gradients(torch.compile(model, backend=mhc, options=options), model, x)
        torch._dynamo.reset()
        quiet = options["lower"] == "eager" or "fuse" in options
        assert [n for n in last_record().notes if "no seams" in n] or quiet


def test_identities_tell_plans_apart():
    def identity(**options):
        return Recompute(parse_options(options), GraphRecord(parse_options(options)), None).uuid()

    assert identity(recompute=2) == identity(recompute=2)
    assert len({str(identity(recompute=r)) for r in ("off", "paper", "timeline", 2, (2, 2))}) == 5


@pytest.mark.parametrize("recompute", [3, "paper", "timeline", "off"])
def test_without_tokens_nothing_is_planned(recompute):
    model, x = Sublayers(L), torch.randn(2, 0, C)
    grads = run(model, x, recompute, "aot_eager")
    assert grads[1].shape == x.shape and not any(g.any() for g in grads)
    assert last_record().choices == [] and not last_record().rebuilt and not last_record().notes


@pytest.mark.parametrize("recompute", [3, "paper", "timeline"])
def test_a_stream_without_tokens_does_not_keep_another_from_its_plan(recompute):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Sublayers(L), Sublayers(L)

        def forward(self, x):
            return self.a(x[:, :0]), self.b(x)

    model, x = Two(), torch.randn(2, 5, C)
    assert model(x)[0].numel() == 0

    def both(call):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        sum((out * 0.5).sum() for out in call(leaf)).backward()
        return [leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    results = []
    for plan in ("off", recompute):
        torch.compiler.reset()
        options = {"lower": "aot_eager", "recompute": plan}
        results.append(both(torch.compile(model, backend=mhc, options=options, fullgraph=True)))
    assert len(last_record().choices) == 1 and last_record().rebuilt > 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_blocks_that_do_not_fit():
    model, x = Sublayers(4), torch.randn(2, 5, C)
    with pytest.raises(Exception, match="must sum to layers=4, got 5"):
        run(model, x, (2, 3), "aot_eager")
    with pytest.raises(Exception, match="memory_budget must be at least"):
        run(model, x, "budget", "aot_eager", memory_budget=8)


def test_what_recomputes_nothing_says_so():
    model, x = Sublayers(2), torch.randn(2, 5, C)
    with pytest.warns(UserWarning, match="nothing is recomputed"):
        run(model, x, 2, "eager")
    with pytest.warns(UserWarning, match="nothing is recomputed"):
        run(model, x, 2, "aot_eager", fuse=False)
