"""What the passes fuse and what they must leave alone, on small models run in eager."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mhc_compile as mc
from mhc_compile.backend import compile_graph, lowerings, mhc
from mhc_compile.backend.graph_nodes import mhc_op
from mhc_compile.backend.records import last_record
from mhc_compile.runtime import fused, ops

C, N = 12, 3


class Sublayers(nn.Module):
    """A stream through sublayers, written with mHC from the start; subclasses change a step."""

    def __init__(self, count=3, config=None):
        super().__init__()
        config = config or mc.MHCConfig(streams=N, init="paper")
        self.connections = nn.ModuleList(
            mc.HyperConnection(C, config, index=k) for k in range(count)
        )
        self.linears = nn.ModuleList(nn.Linear(C, C) for _ in range(count))
        self.norms = nn.ModuleList(nn.RMSNorm(C, eps=1e-6) for _ in range(count))
        self.weights = nn.Parameter(torch.rand(N))
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def sublayer(self, k, h):
        return torch.tanh(self.linears[k](self.norms[k](h)))

    def between(self, k, x):
        return x

    def forward(self, x):
        x = mc.expand_streams(x, N)
        for k, connection in enumerate(self.connections):
            h, state = connection.pre(x)
            x = self.between(k, connection.post(x, self.sublayer(k, h), state))
        return mc.collapse_streams(x, self.weights)


def compiled_equals_eager(model, x, lower="eager", limit=2e-5, **options):
    """Outputs and gradients; returns the record of the compiled graph."""
    torch.compiler.reset()
    call = torch.compile(model, backend=mhc, fullgraph=True, options={"lower": lower, **options})
    found = []
    for run in (model, call):
        model.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        out = run(leaf)
        whole = out if isinstance(out, tuple) else (out,)
        sum(
            (o * torch.linspace(-1, 1, o.numel()).view(o.shape).cos()).sum() for o in whole
        ).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        entering = [] if leaf.grad is None else [leaf.grad]
        found.append([*(o.detach() for o in whole), *entering, *grads.values()])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= limit * b.abs().max()
    return last_record()


def kinds(record):
    return [(f.site.rpartition(".")[2], f.kind) for f in record.fused]


def reasons(record, kind):
    return [n.reason for n in record.not_fused if n.kind == kind]


def inputs(*lead):
    return torch.randn(*(lead or (2, 5)), C)


def test_every_seam_and_norm():
    record = compiled_equals_eager(Sublayers(), inputs())
    assert record.operators == {"expand": 1, "read": 3, "post_res": 3, "collapse": 1}
    assert kinds(record)[:2] == [("1", "seam"), ("2", "seam")]
    assert record.count("rms norm") == 2 and record.count("merge and collapse") == 1
    assert reasons(record, "expand") == ["the operators read stored streams"]
    assert reasons(record, "seam") == []


@pytest.mark.parametrize("lower", ["aot_eager", "inductor"])
def test_other_lowerings(lower):
    record = compiled_equals_eager(Sublayers(2), inputs(), lower)
    assert record.count("seam") == 1
    assert record.count("expand") == (lower == "inductor")
    assert record.kernels == ("formulas" if lower == "inductor" else "operators")


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_passes_of_the_user_run_too(several):
    """Inductor takes plain functions, for which its caches are off, and in newer versions lists."""
    calls = []

    def note(name):
        return lambda graph: calls.append(name)

    def setting(name):
        return [note(name), note(name)] if several else note(name)

    passes = {"joint_custom_post_pass": "joint", "post_grad_custom_pre_pass": "after"}
    settings = {key: setting(name) for key, name in passes.items()}
    compiled_equals_eager(Sublayers(2), inputs(), "inductor", inductor=settings)
    assert calls == ["joint"] * (1 + several) + ["after"] * 2 * (1 + several)


def test_inductor_adds_up_the_first_streams_where_operators_stay(monkeypatch):
    """As beside generated kernels: all others are calls, on a CPU those of torch."""
    monkeypatch.setattr(lowerings, "choose_kernels", lambda gm, record: "operators")
    left = []

    def note(graph):
        names = [mhc_op(node) for node in graph.nodes if mhc_op(node)]
        adds_up = any(node.target is torch.ops.aten.sum.dim_IntList and node.args[1] == [-2]
                      for node in graph.nodes)  # fmt: skip
        left.append((names, adds_up))

    settings = {"post_grad_custom_post_pass": note}
    record = compiled_equals_eager(Sublayers(2), inputs(), "inductor", inductor=settings)
    assert record.count("seam") == 1 and record.kernels == "operators"
    (forward, _), (backward, adds_up) = left
    assert {"expand", "read", "seam", "pre"} <= set(forward)
    assert {"pre_backward", "seam_backward", "read_backward"} <= set(backward)
    assert "expand_backward" not in backward and adds_up


class Noted:
    """The operators in torch; of each call, how many different streams it got to read."""

    def __init__(self, calls):
        self.calls = calls

    def __getattr__(self, name):
        def call(*args):
            if (place := ops._STREAMS_AT.get(name)) is not None:
                x = args[place]
                self.calls.append((name, 1 if x.stride(-2) == 0 else x.shape[-2]))
            return getattr(fused, name)(*args)

        return call


@pytest.mark.parametrize("options", [{}, {"recompute": 2}, {"overlap": True}], ids=str)
@pytest.mark.parametrize("lower", ["aot_eager", "inductor"])
def test_kernels_read_one_row_where_a_stream_starts(lower, options, monkeypatch):
    """Of a view of stride 0, which Inductor hands on as it is; here torch runs the operators."""
    calls = []
    monkeypatch.setattr(lowerings, "choose_kernels", lambda gm, record: "triton")
    monkeypatch.setattr(ops, "fused", Noted(calls))
    with torch._inductor.config.patch(force_disable_caches=True):
        record = compiled_equals_eager(Sublayers(3), inputs(), lower, **options)
    assert record.count("expand") == 1 and not reasons(record, "expand")
    once = [call for call in calls if call[1] == 1]
    again = [("post_res", 1)] if "recompute" in options else []
    assert once == [("read", 1), ("seam", 1), *again, ("seam_backward", 1),
                        ("read_backward", 1)]  # fmt: skip


def test_streams_that_leave_the_graph_are_stored(monkeypatch):
    """Code after the graph may change one of them in place."""

    def double(x):
        x = mc.expand_streams(x, N)
        torch._dynamo.graph_break()
        x[..., 1, :] *= 2
        return mc.collapse_streams(x)

    x = torch.randn(2, 4, C)
    kept = []
    monkeypatch.setattr(compile_graph, "keep", kept.append)
    with torch.no_grad():
        out = torch.compile(double, backend=mhc)(x)
    torch.testing.assert_close(out, x * (N + 1) / N)
    assert reasons(kept[0], "expand") == [
        "the streams leave the graph, where they may be changed in place"
    ]


def second_of(streams):
    return streams[..., 1, :]


def unbound(streams):
    return streams.unbind(-2)[1]


@pytest.mark.parametrize("view", [second_of, unbound])
@pytest.mark.parametrize("broken", [False, True], ids=["in the graph", "after it"])
def test_a_stream_that_is_changed_by_a_view_of_it(view, broken):
    """It is memory of its own: neither another stream nor what was expanded changes."""

    def double(x):
        streams = mc.expand_streams(x, N)
        stream = view(streams)
        if broken:
            torch._dynamo.graph_break()
        stream *= 2
        return stream, streams.sum(-2)

    x = torch.randn(2, 4, C)
    kept = x.clone()
    with torch.no_grad():
        stream, total = torch.compile(double, backend=mhc, options={"lower": "inductor"})(x)
    assert torch.equal(x, kept)
    torch.testing.assert_close(stream, 2 * x)
    torch.testing.assert_close(total, (N + 1) * x)


def test_a_checkpointed_block_may_change_a_stream():
    def block(streams):
        streams[..., 1, :] *= 2
        return streams.sum(-2)

    def double(x):
        return checkpoint(block, mc.expand_streams(x, N), use_reentrant=False)

    x = torch.randn(2, 4, C)
    kept = x.clone()
    with torch.no_grad():
        total = torch.compile(double, backend=mhc, options={"lower": "inductor"})(x)
    assert torch.equal(x, kept)
    torch.testing.assert_close(total, (N + 1) * x)
    assert reasons(last_record(), "expand") == ["the streams may be changed in place"]


def test_fusion_off():
    record = compiled_equals_eager(Sublayers(), inputs(), fuse=False)
    assert record.fused == [] and record.operators["read"] == 3


class Rms(nn.Module):
    """The forms in which models write an RMSNorm."""

    def __init__(self, form):
        super().__init__()
        self.weight, self.form = nn.Parameter(torch.rand(C) + 0.5), form

    def forward(self, h):
        form, w = self.form, self.weight
        if form == "llama":
            wide = h.to(torch.float32)
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
            return w * wide.to(h.dtype)
        if form == "gemma":
            wide = h.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
            return (wide * (1.0 + w.float())).type_as(h)
        if form == "weight of a weight":
            w = w.float()
            return h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-5) * ((w + 1.0) * w)
        if form == "t5":
            variance = h.to(torch.float32).pow(2).mean(-1, keepdim=True)
            return w * (h * torch.rsqrt(variance + 1e-5))
        if form == "product":
            return h * torch.rsqrt((h * h).mean(dim=-1, keepdim=True) + 1e-5) * w
        if form == "quotient":
            return h / torch.sqrt(torch.mean(h**2, -1, keepdim=True) + 1e-5)
        if form == "function":
            return F.rms_norm(h, (C,), w, 1e-5)
        if form == "layer":
            return F.layer_norm(h, (C,), w)
        if form == "other eps":
            return h * torch.rsqrt((h * h).mean(-1, keepdim=True) + w.square().mean())
        if form == "two axes":
            return h * torch.rsqrt((h * h).mean((-1, -2), keepdim=True) + 1e-5) * w
        if form == "twice":
            return F.rms_norm(h, (C,), w, 1e-5) + 0.1 * h
        if form == "last two":
            return F.layer_norm(h, h.shape[-2:])
        raise AssertionError(form)


@pytest.mark.parametrize(
    ("form", "kind"),
    [("llama", "rms"), ("gemma", "rms"), ("t5", "rms"), ("product", "rms"),
     ("quotient", "rms"), ("weight of a weight", "rms"), ("function", "rms"),
     ("layer", "layer"), ("other eps", None), ("two axes", None), ("twice", None),
     ("last two", None)],
)  # fmt: skip
def test_forms_of_norms(form, kind):
    model = Sublayers(2)
    model.norms = nn.ModuleList(Rms(form) for _ in range(2))
    record = compiled_equals_eager(model, inputs())
    assert record.count("seam") == 1
    assert record.count(f"{kind} norm") == (kind is not None)
    assert len(reasons(record, "norm")) == (kind is None)


class ReadsStreams(Sublayers):
    def forward(self, x):
        x = mc.expand_streams(x, N)
        seen = []
        for k, connection in enumerate(self.connections):
            h, state = connection.pre(x)
            x = connection.post(x, self.sublayer(k, h), state)
            seen.append(x.mean(-2))
        return mc.collapse_streams(x, self.weights), *seen


def test_extra_readers_of_the_streams():
    record = compiled_equals_eager(ReadsStreams(), inputs())
    assert record.count("seam") == 2
    assert reasons(record, "merge and collapse") == ["the streams are read elsewhere too"]


class ReadsInput(Sublayers):
    def sublayer(self, k, h):
        return super().sublayer(k, h) + 0.5 * h


def test_extra_readers_of_the_input():
    record = compiled_equals_eager(ReadsInput(), inputs())
    assert record.count("seam") == 2 and record.count("rms norm") == 0


class ChangesInPlace(Sublayers):
    def between(self, k, x):
        return x.mul_(0.5)


class ChangesAView(Sublayers):
    def between(self, k, x):
        x[..., 0, :].add_(1.0)
        return x


class ChangesByActivation(Sublayers):
    def between(self, k, x):
        F.relu(x, inplace=True)
        return x


class ChangesByItem(Sublayers):
    def between(self, k, x):
        x[..., 0] = 1.0
        return x


@pytest.mark.parametrize("kind", [ChangesInPlace, ChangesAView, ChangesByActivation, ChangesByItem])
def test_streams_changed_in_place(kind):
    record = compiled_equals_eager(kind(), inputs())
    assert record.count("seam") == 0 and record.count("merge") == 0
    assert len(reasons(record, "seam")) == 2


class ChangesInputInPlace(Sublayers):
    def sublayer(self, k, h):
        h = h.mul_(2.0)
        return super().sublayer(k, h)


def test_input_changed_in_place():
    record = compiled_equals_eager(ChangesInputInPlace(), inputs())
    assert record.count("seam") == 2 and record.count("rms norm") == 0


class PostNorm(Sublayers):
    def between(self, k, x):
        return F.layer_norm(x, (C,))


def test_streams_through_a_norm():
    record = compiled_equals_eager(PostNorm(), inputs())
    assert record.count("seam") == 0
    assert all("the streams go through" in reason for reason in reasons(record, "seam"))


class WithoutGradients(Sublayers):
    def forward(self, x):
        x = mc.expand_streams(x, N)
        h, state = self.connections[0].pre(x)
        with torch.no_grad():
            x = self.connections[0].post(x, self.sublayer(0, h), state)
        h, state = self.connections[1].pre(x)
        return self.connections[1].post(x, self.sublayer(1, h), state).mean(-2)


def test_regions_without_gradients():
    record = compiled_equals_eager(WithoutGradients(), inputs())
    assert record.count("seam") == 0
    assert reasons(record, "seam") == ["gradients are switched on or off between the sublayers"]


class DropsOut(Sublayers):
    def sublayer(self, k, h):
        return 0.7 * F.dropout(super().sublayer(k, h), 0.0) + 0.0


def test_dropout_and_multipliers_lie_inside_the_sublayer():
    record = compiled_equals_eager(DropsOut(), inputs())
    assert record.count("seam") == 2


class ReadTwice(Sublayers):
    def forward(self, x):
        x = mc.expand_streams(x, N)
        h, state = self.connections[0].pre(x)
        x = self.connections[0].post(x, self.sublayer(0, h), state)
        (a, first), (b, second) = self.connections[1].pre(x), self.connections[2].pre(x)
        x = self.connections[1].post(x, self.sublayer(1, a), first)
        return mc.collapse_streams(self.connections[2].post(x, self.sublayer(2, b), second))


def test_streams_read_by_two_sublayers():
    record = compiled_equals_eager(ReadTwice(), inputs())
    assert record.count("seam") == 1
    assert any("another sublayer" in reason for reason in reasons(record, "seam"))


class Checkpointed(Sublayers):
    def block(self, k, x):
        for number in (k, k + 1):
            h, state = self.connections[number].pre(x)
            x = self.connections[number].post(x, self.sublayer(number, h), state)
        return x

    def forward(self, x):
        x = mc.expand_streams(x, N)
        for k in (0, 2):
            x = checkpoint(self.block, k, x, use_reentrant=False)
        return mc.collapse_streams(x)


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_checkpointed_blocks(lower):
    record = compiled_equals_eager(Checkpointed(4), inputs(), lower)
    assert record.count("seam") == 2
    assert len(reasons(record, "seam")) == 2


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
@pytest.mark.parametrize("connection", ["hc", "mhc"])
@pytest.mark.parametrize("n", [1, 2, 8])
def test_streams_and_connections(n, connection, lower):
    class Model(Sublayers):
        def forward(self, x):
            x = mc.expand_streams(x, n)
            for k, part in enumerate(self.connections):
                h, state = part.pre(x)
                x = part.post(x, self.sublayer(k, h), state)
            return mc.collapse_streams(x)

    config = mc.MHCConfig(streams=n, connection=connection, init="paper")
    record = compiled_equals_eager(Model(config=config), inputs(), lower)
    assert record.count("seam") == (2 if n > 1 and connection == "mhc" else 0)


@pytest.mark.parametrize("shape", [(1,), (4, 1), (2, 3, 4)], ids=str)
def test_leading_dimensions(shape):
    assert compiled_equals_eager(Sublayers(), inputs(*shape)).count("seam") == 2


class Selects(Sublayers):
    def forward(self, x):
        return super().forward(x[x[:, 0] > 0])


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_number_of_tokens_that_depends_on_data(lower):
    assert compiled_equals_eager(Selects(), inputs(20), lower).count("seam") == 2


def test_plain_residuals_are_named():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(C, C)

        def forward(self, x):
            return x + self.linear(F.layer_norm(x, (C,)))

    model, x = Plain(), inputs()
    with pytest.warns(UserWarning, match="call mhc_compile.transform"):
        out = torch.compile(model, backend=mhc, options={"lower": "eager"})(x)
    torch.testing.assert_close(out, model(x))


def test_graphs_without_residuals_are_not_warned_of(recwarn):
    model = nn.Sequential(nn.Linear(C, C), nn.ReLU())
    torch.compile(model, backend=mhc, options={"lower": "eager"})(inputs())
    assert not [w for w in recwarn if "mhc" in str(w.message)]


def test_an_illegal_graph_is_reported(monkeypatch):
    from mhc_compile.backend import compile_graph

    def loses_a_read(graph, record):
        node = next(n for n in graph.nodes if n.target is torch.ops.mhc.read)
        node.target = torch.ops.mhc.seam

    monkeypatch.setattr(compile_graph, "PASSES", (loses_a_read,))
    torch.compiler.reset()
    with pytest.raises(Exception, match="loses_a_read left an illegal graph"):
        torch.compile(Sublayers(), backend=mhc, options={"lower": "eager"})(inputs())
