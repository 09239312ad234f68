"""`unchanged_on_error` on modules that keep dicts of their own kinds."""

from collections import OrderedDict

import pytest
from torch import nn

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
