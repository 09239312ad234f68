"""`Op`, and the ops that make up an action: what runs, on which server, after what."""

from __future__ import annotations

from dataclasses import dataclass

from mhc_compile.scheduler.op_costs import OpCosts

SERVERS = ("compute", "hp", "a2a", "pp_out", "pp_in")
COMPUTE, HIGH, ALL_TO_ALL, OUT, IN = range(len(SERVERS))


@dataclass(frozen=True)
class Op:
    """One entry of a server's queue.

    Attributes:
        id: unique in its action, e.g. "F0.mlp" or "B1.attention_W": chunk, layer, kind.
        chunk: "F" or "B", the chunk it belongs to.
        server: one of `SERVERS`; compute and hp share the SMs, hp goes first.
        deps: ids of the ops whose results it reads.
        duration: us.
        preemptible: whether hp may interrupt it.
    """

    id: str
    chunk: str
    server: str
    deps: tuple[str, ...]
    duration: float
    preemptible: bool = True


def build_ops(costs: OpCosts, kind: str, *, high_priority: bool = True) -> tuple[Op, ...]:
    """Returns an action's ops, of an "FB" alternately of the forward and of the backward.

    With high_priority the F_post,res of MLP sublayers are on the hp server (Sec. 4.3.3), else
    among the others. Sends follow their chunk's last op, whatever else still runs.
    """
    forward = _forward(costs, high_priority) if kind in ("F", "FB") else []
    backward = _backward(costs) if kind != "F" else []
    if kind in ("I", "W"):
        weights = [op for op in backward if op.id.endswith("_W")]
        kept = weights if kind == "W" else [op for op in backward if op not in weights]
        ids = {op.id for op in kept}
        backward = [
            Op(op.id, op.chunk, op.server, tuple(dep for dep in op.deps if dep in ids),
               op.duration, op.preemptible)
            for op in kept
        ]  # fmt: skip
    mixed = [op for ops in zip(forward, backward, strict=False) for op in ops]
    shorter = min(len(forward), len(backward))
    return tuple(mixed + forward[shorter:] + backward[shorter:])


def _forward(costs: OpCosts, high_priority: bool) -> list[Op]:
    """recv; per layer: coefficients, pre, attention, post_res; the same around the MLP; send."""
    chain = _Chain("F")
    chain.add("recv", "pp_in", costs.recv)
    for layer in range(costs.layers):
        chain.layer = layer
        chain.add("attention_coefficients", "compute", costs.coefficients_F)
        chain.add("attention_pre", "compute", costs.pre_F)
        chain.add("attention", "compute", costs.attention_F, costs.attention_preemptible)
        chain.add("attention_post_res", "compute", costs.post_res_F)
        chain.add("mlp_coefficients", "compute", costs.coefficients_F)
        chain.add("mlp_pre", "compute", costs.pre_F)
        chain.add("dispatch", "a2a", costs.dispatch)
        chain.add("mlp", "compute", costs.mlp_F)
        chain.add("combine", "a2a", costs.combine)
        chain.add("mlp_post_res", "hp" if high_priority else "compute", costs.post_res_F)
    chain.add("send", "pp_out", costs.send)
    return chain.ops


def _backward(costs: OpCosts) -> list[Op]:
    """recv; blocks of layers from the last: recompute, then each layer backwards; send.

    A block's recompute needs nothing that is received: its x_l0 is local. It waits for the block
    above it only, whose states must be gone first.
    """
    chain = _Chain("B")
    chain.add("recv", "pp_in", costs.recv)
    size = costs.layers // costs.recompute_blocks
    for layer in reversed(range(costs.layers)):
        chain.layer = layer
        if (layer + 1) % size == 0:
            first = layer == costs.layers - 1
            recompute = chain.branch(
                "recompute", "compute", size * costs.recompute, after=() if first else None
            )
        chain.add("mlp_post_res", "compute", costs.post_res_B, extra=(recompute,))
        chain.add("combine", "a2a", costs.combine)
        chain.add("mlp", "compute", costs.mlp_B)
        chain.branch("mlp_W", "compute", costs.mlp_W)
        chain.add("dispatch", "a2a", costs.dispatch)
        chain.add("mlp_pre", "compute", costs.pre_B)
        chain.add("mlp_coefficients", "compute", costs.coefficients_B)
        chain.add("attention_post_res", "compute", costs.post_res_B)
        chain.add("attention", "compute", costs.attention_B, costs.attention_preemptible)
        chain.branch("attention_W", "compute", costs.attention_W)
        chain.add("attention_pre", "compute", costs.pre_B)
        chain.add("attention_coefficients", "compute", costs.coefficients_B)
    chain.add("send", "pp_out", costs.send)
    return chain.ops


class _Chain:
    """Ops of a chunk, each after the one before it unless it branches off."""

    def __init__(self, chunk: str) -> None:
        self.chunk, self.layer = chunk, 0
        self.ops: list[Op] = []
        self.last: tuple[str, ...] = ()

    def add(
        self, kind: str, server: str, duration: float, preemptible: bool = True,
        extra: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Appends an op that the next one waits for."""
        after = (*self.last, *(dep for dep in extra if dep not in self.last))
        self.last = (self._append(kind, server, duration, preemptible, after),)

    def branch(
        self, kind: str, server: str, duration: float, after: tuple[str, ...] | None = None
    ) -> str:
        """Appends an op that the next one does not wait for; returns its id."""
        return self._append(kind, server, duration, True, self.last if after is None else after)

    def _append(
        self, kind: str, server: str, duration: float, preemptible: bool, deps: tuple[str, ...]
    ) -> str:
        edge = kind in ("recv", "send")  # of the chunk, not of a layer
        name = f"{self.chunk}.{kind}" if edge else f"{self.chunk}{self.layer}.{kind}"
        self.ops.append(Op(name, self.chunk, server, deps, duration, preemptible))
        return name
