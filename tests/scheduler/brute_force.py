"""Every way to cut sublayers into blocks, costed from the formulas and from a simulated memory."""

from dataclasses import dataclass, field
from itertools import combinations


@dataclass(frozen=True)
class Instance:
    """One stage: X a boundary, T and A per sublayer, m microbatches in flight, H of the head.

    G are the gradients of each sublayer's weights, for m = 1, and J what flows besides.
    """

    X: int
    T: tuple
    A: tuple
    m: int = 1
    H: int = 0
    G: tuple = ()
    J: int = 0

    @property
    def counted(self):
        """G, of each sublayer at most what it frees."""
        grads = self.G or (0,) * len(self.T)
        return [min(g, t + a) for g, t, a in zip(grads, self.T, self.A, strict=True)]

    @property
    def arguments(self):
        """As `solve_recompute` takes them."""
        return {
            "transient": self.T, "kept": self.A, "in_flight": self.m, "head": self.H,
            "gradients": self.G or 0, "flowing": self.J,
        }  # fmt: skip


def compositions(layers):
    """Every tuple of positive sizes that sum to `layers`."""
    for blocks in range(1, layers + 1):
        for cuts in combinations(range(1, layers), blocks - 1):
            ends = (*cuts, layers)
            yield tuple(b - a for a, b in zip((0, *cuts), ends, strict=True))


def parts(values, sizes):
    """The values of each block."""
    begin = 0
    for size in sizes:
        yield values[begin : begin + size]
        begin += size


def paper(stage, sizes):
    return stage.m * stage.X * len(sizes) + max(sum(part) for part in parts(stage.T, sizes))


def timeline(stage, sizes):
    """The formula for the true peak."""
    X, everything = stage.X, stage.X * len(sizes) + sum(stage.A)
    terms, end = [], 0
    for b, part in enumerate(parts(stage.T, sizes)):
        end += sizes[b]
        added = stage.J + sum(stage.counted[end:])
        terms.append(X * (b + 1) + sum(stage.A[:end]) + sum(part) + added)
    return (stage.m - 1) * everything + max(everything + stage.H, *terms)


@dataclass
class Memory:
    """What is allocated by name, and the most that ever was."""

    held: dict = field(default_factory=dict)
    peak: int = 0

    def allocate(self, name, size):
        assert name not in self.held
        self.held[name] = size
        self.peak = max(self.peak, sum(self.held.values()))

    def free(self, name):
        del self.held[name]


def simulate(stage, sizes):
    """The peak of m forwards and then m backwards, each allocation an event of its own."""
    memory, layers = Memory(), range(len(stage.T))
    begins = [sum(sizes[:b]) for b in range(len(sizes))]
    for micro in range(stage.m):
        for layer in layers:
            if layer in begins:
                memory.allocate(("x", micro, layer), stage.X)
            memory.allocate(("F", micro, layer), stage.A[layer])
    for micro in range(stage.m):
        memory.allocate(("head", micro), stage.H)
        memory.free(("head", micro))
        memory.allocate(("flowing", micro), stage.J)
        for begin, size in reversed(list(zip(begins, sizes, strict=True))):
            for layer in range(begin, begin + size):
                memory.allocate(("again", layer), stage.T[layer])
            for layer in reversed(range(begin, begin + size)):
                memory.free(("again", layer))
                memory.free(("F", micro, layer))
                memory.allocate(("gradients", micro, layer), stage.counted[layer])
            memory.free(("x", micro, begin))
        memory.free(("flowing", micro))
    assert all("gradients" in name[0] for name in memory.held)
    return memory.peak


def best(stage, objective, budget=None):
    """The optimum by trying all: cost, ties, sizes by the stated rule; None if nothing fits."""
    rows = []
    for sizes in compositions(len(stage.T)):
        ends = tuple(sum(sizes[: b + 1]) for b in range(len(sizes)))
        if objective == "budget":
            if timeline(stage, sizes) > budget:
                continue
            cost = (2 * len(stage.T) - len(sizes), timeline(stage, sizes))
        else:
            cost = (paper if objective == "paper" else timeline)(stage, sizes)
        rows.append((cost, -len(sizes), tuple(-end for end in ends), sizes))
    if not rows:
        return None
    cost = min(rows)[0]
    ties = sorted({max(sizes) for value, _, _, sizes in rows if value == cost})
    return cost, tuple(ties), min(rows)[-1]
