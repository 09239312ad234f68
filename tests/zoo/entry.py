"""What the zoo states of an architecture before any test of it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

GENERATE = ("greedy", "beam", "static_cache", "left_padding")


@dataclass(frozen=True)
class Entry:
    """One tiny model with random weights, and the residual sites that its source code shows.

    Attributes:
        name: unique, as in the table, e.g. "Llama".
        family: heading of the table, e.g. "decoder-only".
        make: builds the model; called under a fixed seed, small enough for seconds on a CPU.
        inputs: `(batch, length, seed)` to the keyword arguments of one forward; a model without
            a length (images) may ignore it, but must then vary something else, such as the batch.
        sites: how many residual adds each stream has, in execution order of the streams.
        why: where that number comes from, in a few words of the model's own structure.
        result: picks the tensor to compare and to train on out of the model's result.
        generate: which ways of `generate()` with a cache the model supports; empty if none.
        refused: (regular expression of a reason, number of sites refused), where the honest answer
            for some residuals is no; the accepted ones are those in `sites`.
        no_reference: why the lock-step reference cannot follow the model, if it cannot.
        loose: a factor on tolerances, with the reason beside the entry, for models whose own
            arithmetic amplifies rounding (e.g. top-k routing on near ties).
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    sites: tuple[int, ...]
    why: str
    result: Callable[[Any], Tensor]
    generate: tuple[str, ...] = ()
    refused: tuple[str, int] | None = None
    loose: float = 1.0
    no_reference: str = ""
