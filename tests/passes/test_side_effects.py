"""What a block's forward does besides its result: the rewritten block does it too, or says no."""

import copy
import inspect
import warnings
from dataclasses import dataclass

import pytest
import torch
from models import WIDTH, Block, NanoGPT, assert_unchanged, perturb, snapshot, tokens
from torch import nn

import mhc_compile as mc
from mhc_compile.errors import TraceError

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def both(block, **kwargs):
    """An original model and a transformed copy of it."""
    original = NanoGPT(block=block).eval()
    model = mc.transform(copy.deepcopy(original), streams=2, **kwargs)
    return original, model


def line_of(cls, text):
    lines, start = inspect.getsourcelines(cls)
    return f"test_side_effects.py:{start + next(k for k, line in enumerate(lines) if text in line)}"


# --- attributes -----------------------------------------------------------------------------------


class CountsCalls(Block):
    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__(width, dropout)
        self.calls, self.first, self.seen, self.shape = 0, True, None, None

    def forward(self, x):
        self.calls += 1
        if self.first:
            self.first = False
        branch = self.attn(self.ln_1(x))
        self.seen = branch
        self.shape = (x.shape[0], x.shape[1])
        x = x + branch
        return x + self.mlp(self.ln_2(x)) * (1 + self.calls)


@torch.no_grad()
def test_assigned_attributes_are_kept():
    original, model = both(CountsCalls)
    # The model ran three times to be transformed; see api.transform.
    for block, other in zip(model.h, original.h, strict=True):
        block.calls, block.first = other.calls, other.first
    for length in (4, 6, 4):
        idx = tokens(2, length, seed=length)
        torch.testing.assert_close(model(idx), original(idx), **TOLERANCE)
        for block, other in zip(model.h, original.h, strict=True):
            assert (block.calls, block.first, block.shape) == (other.calls, False, (2, length))
            torch.testing.assert_close(block.seen, other.seen, **TOLERANCE)
    assert model.h[0].calls == 3


class BranchesOnItsCounter(Block):
    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__(width, dropout)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = x + self.attn(self.ln_1(x))
        if self.calls % 3 == 0:
            return x + 2 * self.mlp(self.ln_2(x))
        return x + self.mlp(self.ln_2(x))


@torch.no_grad()
def test_a_branch_on_a_counter():
    original, model = both(BranchesOnItsCounter)
    for block in (*model.h, *original.h):
        block.calls = 0
    outputs = [(model(tokens()), original(tokens())) for _ in range(7)]
    for got, wanted in outputs:
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    assert not torch.allclose(outputs[2][0], outputs[1][0])
    assert torch.equal(outputs[5][0], outputs[2][0])


class MovingAverages(Block):
    """Buffers: changed in place, assigned anew, and written by index."""

    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__(width, dropout)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("history", torch.zeros(4, width))
        self.register_buffer("last", torch.zeros(width), persistent=False)

    def forward(self, x):
        branch = self.attn(self.ln_1(x))
        self.mean.mul_(0.9).add_(branch.mean((0, 1)), alpha=0.1)
        self.steps += 1
        self.history[1:] = self.history[:-1].clone()
        self.history[0] = self.mean
        self.last = self.mean * 2
        x = x + branch - self.mean
        return x + self.mlp(self.ln_2(x)) / self.steps


@torch.no_grad()
def test_buffers_are_updated():
    original, model = both(MovingAverages)
    for block, other in zip(model.h, original.h, strict=True):
        for name, buffer in other.named_buffers():
            assert torch.equal(block.get_buffer(name), buffer), f"{name} changed in transform"
    for seed in range(3):
        idx = tokens(seed=seed)
        torch.testing.assert_close(model(idx), original(idx), **TOLERANCE)
    assert int(model.h[1].steps) == 3
    for block, other in zip(model.h, original.h, strict=True):
        for name, buffer in other.named_buffers():
            torch.testing.assert_close(block.get_buffer(name), buffer, **TOLERANCE)
    assert set(model.state_dict()) - {n for n, _ in mc.mhc_parameters(model)} == set(
        original.state_dict()
    )


class ListOnSelf(Block):
    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__(width, dropout)
        self.kept = []

    def forward(self, x):
        branch = self.attn(self.ln_1(x))
        self.kept.append(branch)
        x = x + branch
        return x + self.mlp(self.ln_2(x))


class NewModule(Block):
    def forward(self, x):
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(WIDTH, WIDTH)
        x = x + self.attn(self.ln_1(x))
        return x + self.extra(self.ln_2(x))


# --- globals and closures -------------------------------------------------------------------------

CALLS = 0
LOG = []
STATISTICS = {"calls": 0}
WARNED = False


class ChangesAGlobal(Block):
    def forward(self, x):
        global CALLS
        CALLS += 1
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class AppendsToAGlobal(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        if len(LOG) < 1000:
            LOG.append(x.shape)
        return x + self.mlp(self.ln_2(x))


def note_call():
    STATISTICS["calls"] += 1


class CallsAHelperThatDoes(Block):
    def forward(self, x):
        note_call()
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Settings:
    last = None


class ChangesAClass(Block):
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        Settings.last = x
        return x + self.mlp(self.ln_2(x))


def make_closure(kept):
    count = 0

    class Closure(Block):
        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            kept.append(x)
            return x + self.mlp(self.ln_2(x))

    class Nonlocal(Block):
        def forward(self, x):
            nonlocal count
            x = x + self.attn(self.ln_1(x))
            count += 1
            return x + self.mlp(self.ln_2(x))

    return Closure, Nonlocal


KEPT = []
Closure, Nonlocal = make_closure(KEPT)

REFUSED = [
    (ListOnSelf, "self.kept.append", "self.kept"),
    (NewModule, "self.extra = ", "Linear"),
    (ChangesAGlobal, "CALLS += 1", "CALLS"),
    (AppendsToAGlobal, "LOG.append", "LOG"),
    (ChangesAClass, "Settings.last = x", "Settings.last"),
    (Closure, "kept.append", "kept"),
    (Nonlocal, "count += 1", "count"),
]


@pytest.mark.parametrize(("block", "text", "name"), REFUSED, ids=[c[0].__name__ for c in REFUSED])
def test_what_a_graph_cannot_repeat_is_refused(block, text, name):
    model = NanoGPT(block=block)
    before = snapshot(model)
    with pytest.raises(TraceError) as error:
        mc.transform(model, streams=2)
    message = str(error.value)
    assert line_of(block, text) in message
    assert block.__name__ in message
    assert name in message
    if block is not NewModule and block is not ListOnSelf:  # the recording itself runs them
        assert_unchanged(before, model)
    assert not mc.is_transformed(model)
    assert model(tokens()).isfinite().all()


def test_a_helper_that_changes_a_global_container():
    with pytest.raises(TraceError, match=r"STATISTICS.*test_side_effects.py:\d+") as error:
        mc.transform(NanoGPT(block=CallsAHelperThatDoes), streams=2)
    assert line_of(note_call, 'STATISTICS["calls"] += 1') in str(error.value)


class WarnsOnce(Block):
    def forward(self, x):
        global WARNED
        if not WARNED:
            warnings.warn("only once", stacklevel=2)
            WARNED = True
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


@torch.no_grad()
def test_a_flag_that_notes_a_warning_is_harmless():
    with pytest.warns(UserWarning, match="only once"):
        original, model = both(WarnsOnce)
    assert WARNED
    torch.testing.assert_close(model(tokens()), original(tokens()), **TOLERANCE)


# --- containers handed in -------------------------------------------------------------------------


class Collects(Block):
    def forward(self, x, attentions, state):
        branch = self.attn(self.ln_1(x))
        attentions.append(branch)
        state["count"] = state["count"] + 1
        x = x + branch
        state["last"] = branch
        return x + self.mlp(self.ln_2(x))


class Collecting(NanoGPT):
    def __init__(self):
        super().__init__(block=Collects)

    def forward(self, idx):
        x, attentions, state = self.wte(idx), [], {"count": 0}
        for block in self.h:
            x = block(x, attentions, state)
        assert len(attentions) == len(self.h)
        assert attentions[-1] is state["last"]
        return self.head(self.ln_f(x)), attentions, state["count"]


@torch.no_grad()
def test_lists_and_dicts_handed_in_are_filled():
    original = Collecting().eval()
    model = mc.transform(copy.deepcopy(original), streams=2, example_inputs=tokens())
    for seed in range(2):
        got, wanted = model(tokens(seed=seed)), original(tokens(seed=seed))
        torch.testing.assert_close(got, wanted, **TOLERANCE)
        assert got[2] == 2


class InADict(Block):
    """The stream itself is carried in a dict that every block changes and returns."""

    def forward(self, state):
        x = state["x"]
        x = x + self.attn(self.ln_1(x))
        state["x"] = x + self.mlp(self.ln_2(x))
        return state


class WithDict(NanoGPT):
    def __init__(self, block):
        super().__init__(block=block, depth=3)

    def forward(self, idx):
        state = {"x": self.wte(idx), "mask": None}
        kept = state
        for block in self.h:
            state = block(state)
        assert kept is state
        return self.head(self.ln_f(state["x"]))


class InADictThatIsDropped(InADict):
    def forward(self, state):
        super().forward(state)


class WithDroppedDict(WithDict):
    def forward(self, idx):
        state = {"x": self.wte(idx), "mask": None}
        for block in self.h:
            block(state)
        return self.head(self.ln_f(state["x"]))


@dataclass
class State:
    x: torch.Tensor
    step: int = 0


class InARecord(Block):
    def forward(self, state):
        x = state.x + self.attn(self.ln_1(state.x))
        state.x = x + self.mlp(self.ln_2(x))
        state.step += 1
        return state


class WithRecord(NanoGPT):
    def __init__(self, block):
        super().__init__(block=block, depth=3)

    def forward(self, idx):
        state = State(self.wte(idx))
        for block in self.h:
            state = block(state)
        return self.head(self.ln_f(state.x)) * state.step


class NewRecord(Block):
    def forward(self, state):
        x = state.x + self.attn(self.ln_1(state.x))
        return State(x + self.mlp(self.ln_2(x)), state.step + 1)


PLUMBING = [
    (WithDict, InADict), (WithDroppedDict, InADictThatIsDropped), (WithRecord, InARecord),
    (WithRecord, NewRecord),
]  # fmt: skip


@pytest.mark.parametrize(("model", "block"), PLUMBING, ids=[b.__name__ for _, b in PLUMBING])
@torch.no_grad()
def test_streams_in_containers(model, block):
    original = model(block).eval()
    rewritten = copy.deepcopy(original)
    try:
        mc.transform(rewritten, streams=3, example_inputs=tokens())
    except mc.MHCError as error:
        assert block is InADictThatIsDropped, error
        assert "test_side_effects.py" in str(error) or "h." in str(error)
        return
    assert len([n for n, _ in mc.mhc_parameters(rewritten) if n.endswith("phi")]) == 6
    for seed in range(2):
        idx = tokens(seed=seed)
        torch.testing.assert_close(rewritten(idx), original(idx), **TOLERANCE)
    perturb(rewritten)
    assert (rewritten(idx) - original(idx)).abs().max() > 1e-3


@torch.no_grad()
def test_a_record_that_a_block_only_reads_stays_as_it_is():
    """It is read again where checkpointing recomputes the block."""
    model = mc.transform(WithRecord(NewRecord), streams=3, example_inputs=tokens())
    seen = []
    for block in model.h:
        block.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[0].x)))
    model(tokens())
    assert len(seen) == 3
    assert all(state.x is x for state, x in seen)


def test_the_garbage_collector_may_run_at_any_time():
    """Its callbacks, such as those of profilers, are no part of the traced code."""
    import gc

    def callback(phase, info):
        global COLLECTIONS
        COLLECTIONS += 1

    thresholds = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1, 1, 1)
    try:
        mc.transform(NanoGPT(), streams=2)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(callback)
    assert COLLECTIONS > 0
    assert gc.isenabled()


COLLECTIONS = 0
