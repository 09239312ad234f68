"""Legal sizes of pipelines, and an execution of a plan with its messages."""

from collections import defaultdict

from hypothesis import strategies as st

from mhc_compile.scheduler.layout import VARIANTS


@st.composite
def sizes(draw, variants=VARIANTS):
    """A variant with a legal P and M."""
    variant = draw(st.sampled_from(variants))
    if variant in ("1f1b", "zb1p"):
        return variant, draw(st.integers(1, 9)), draw(st.integers(1, 24))
    ranks = draw(st.integers(1, 5)) * (2 if variant == "dualpipe" else 1)
    extra = draw(st.integers(0, 6)) * (2 if variant == "dualpipe" else 1)
    return variant, ranks, 2 * ranks + extra


def run_with_communicators(plan):
    """Executes actions and messages with a queue per communicator; True if all of it ran.

    A communicator moves a message when both sides posted it and the ones before it are through.
    """
    sends, receives, needs = defaultdict(list), defaultdict(list), defaultdict(list)
    queues = defaultdict(list)
    for message in plan.messages():
        sends[message.source, message.sent_after].append(message)
        receives[message.target, message.posted_before].append(message)
        needs[message.target, message.needed_by].append(message)
        queues[message.source, message.target].append(message)
    assert all(len(entry) <= 2 for entry in needs.values())
    sent, posted, through = defaultdict(list), defaultdict(list), set()
    position = [0] * plan.ranks
    posting = [0] * plan.ranks
    moved = True
    while moved:
        moved = False
        for rank in range(plan.ranks):
            while position[rank] < len(plan.actions[rank]):
                step = position[rank]
                if posting[rank] == step:
                    for message in receives[rank, step]:
                        posted[message.source, rank].append(message)
                    posting[rank] += 1
                if not all(message in through for message in needs[rank, step]):
                    break
                for message in sends[rank, step]:
                    sent[rank, message.target].append(message)
                position[rank] += 1
                moved = True
        for pair, queue in queues.items():
            done = sum(message in through for message in queue)
            n = min(len(sent[pair]), len(posted[pair]))
            assert sent[pair][:n] == posted[pair][:n] == queue[:n]  # one order on both sides
            through.update(queue[done:n])
            moved |= n > done
    return all(p == len(a) for p, a in zip(position, plan.actions, strict=True))
