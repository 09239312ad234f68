"""What is put back: dicts of a module's own kinds, and the random state of repeated runs."""

from collections import OrderedDict

import pytest
import torch
from models import normal
from torch import nn

import mhc_compile as mc
from mhc_compile.passes.undo import unchanged_on_error


class Frozen(dict):
    """Like the config of a diffusers model: it takes no changes and no other constructor call."""

    def __init__(self, *, made_by, **items):
        super().__init__(**items)

    def update(self, *args, **kwargs):
        raise TypeError("frozen")

    clear = pop = __setitem__ = update


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Frozen(made_by="test", width=3)
        self.order = OrderedDict(a=1, b=2)


def test_dicts_that_refuse_changes_do_not_hide_the_error():
    holder = Holder()
    config = holder.config
    with pytest.raises(ValueError, match="the reason"):
        with unchanged_on_error(holder):
            holder.config = Frozen(made_by="test", width=4)
            raise ValueError("the reason")
    assert holder.config is config
    assert dict(config) == {"width": 3}


def test_changed_dicts_come_back_in_their_order():
    holder = Holder()
    order = holder.order
    with pytest.raises(ValueError):
        with unchanged_on_error(holder):
            order["c"] = order.pop("a")
            raise ValueError
    assert holder.order is order
    assert list(order.items()) == [("a", 1), ("b", 2)]


class Permute(nn.Module):
    """Takes tokens in random order in evaluation mode too, as ViLT does with patches."""

    def forward(self, x):
        return x[:, torch.randperm(x.shape[1])]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.inner(self.norm(x)).tanh()


def test_step_0_is_compared_under_the_same_random_state():
    model, x = nn.Sequential(Permute(), Residual()), normal(2, 9, 16)
    torch.manual_seed(3)
    before = model(x)
    mc.transform(model, streams=3, example_inputs=(x,))
    torch.manual_seed(3)
    assert torch.allclose(model(x), before, atol=1e-5)


def test_a_refused_model_takes_no_random_numbers():
    model, x = nn.Sequential(Permute(), nn.Linear(16, 16)), normal(2, 9, 16)
    before = torch.get_rng_state()
    with pytest.raises(mc.MHCError):
        mc.transform(model, example_inputs=(x,))
    assert torch.equal(torch.get_rng_state(), before)
