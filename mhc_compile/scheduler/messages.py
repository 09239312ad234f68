"""What ranks send each other, and the order in which both sides of a communicator post it."""

from __future__ import annotations

from typing import NamedTuple

from mhc_compile.scheduler.layout import Layout
from mhc_compile.scheduler.orders import Orders

Place = tuple[int, int]  # (rank, step)


class Message(NamedTuple):
    """A chunk's output on its way to another rank.

    Attributes:
        source, target: ranks; one communicator for each ordered pair.
        kind: "F" a forward's output, "B" the gradient of a stage's input.
        stage, microbatch: the chunk that made it.
        sent_after: the source's step that makes it.
        posted_before: the target's step before which it posts the receive.
        needed_by: the target's step that reads it.
    """

    source: int
    target: int
    kind: str
    stage: int
    microbatch: int
    sent_after: int
    posted_before: int
    needed_by: int


def order_messages(layout: Layout, orders: Orders, backward_first: bool = False) -> list[Message]:
    """Returns all messages by communicator, and within one in the order both sides post them.

    That order is the one in which they are made, of an overlapped pair's two the forward's first
    unless backward_first.
    Receives are posted as late as this order allows. In a DualPipe the target reads a few in
    another order, so that it posts some before it needs them. Sends must not block: then a
    message that both sides posted finds every earlier one of its communicator posted too, and
    communicators that work in order cannot deadlock if the plan itself does not.
    """
    made: dict[tuple[str, int, int], Place] = {}
    read: dict[tuple[str, int, int], Place] = {}
    for rank, actions in enumerate(orders.actions()):
        for step, action in enumerate(actions):
            for kind, stage, microbatch, _ in action.parts:
                if kind == "F":
                    made["F", stage, microbatch] = rank, step
                    read["F", stage - 1, microbatch] = rank, step
                elif kind in ("B", "I"):
                    made["B", stage, microbatch] = rank, step
                    read["B", stage + 1, microbatch] = rank, step
    found = []
    for key, (source, sent) in made.items():
        target, needed = read.get(key, (source, 0))
        if target != source:
            found.append((source, target, sent, (key[0] == "B") != backward_first, key, needed))
    found.sort(reverse=True)
    messages: list[Message] = []
    for source, target, sent, _, key, needed in found:
        same = messages and (messages[-1].source, messages[-1].target) == (source, target)
        posted = min(needed, messages[-1].posted_before) if same else needed
        messages.append(Message(source, target, *key, sent, posted, needed))
    return messages[::-1]
