"""`OpCosts`: how long the parts of a layer's forward and backward take, measured or modelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mhc_compile.errors import ConfigError
from mhc_compile.scheduler.costs import check_duration


@dataclass(frozen=True)
class OpCosts:
    """Durations in us of one layer (attention and MLP, both with hyper-connections) and a stage.

    Attributes:
        attention_F, attention_B, attention_W: attention; _B the input's gradient, _W the weights'.
        mlp_F, mlp_B, mlp_W: the MLP or the experts.
        dispatch, combine: one all-to-all, the same in the backward; 0 where there are no experts.
        coefficients_F, coefficients_B: mHC's coefficients of one sublayer.
        pre_F, pre_B, post_res_F, post_res_B: their application to one sublayer.
        recompute: one layer's mHC states, made anew before its backward.
        send: a message of n streams to the next rank, each way; counted once, at the sender.
        recv: what is left of a receive once its sender is through.
        quantum: a running preemptible op gives way at multiples of this much of its work.
        contention: c slows compute by 1 + c while any communication runs; 0 for none.
        layers: layers in a stage.
        recompute_blocks: blocks that divide them; a block is recomputed as a whole.
        attention_preemptible: whether attention's kernels are not persistent.
        provenance: where the numbers come from, e.g. "modelled" or "measured on an H100".

    Raises:
        ConfigError: a number makes no sense, or the blocks do not divide the layers.
    """

    attention_F: float  # noqa: N815
    attention_B: float  # noqa: N815
    attention_W: float  # noqa: N815
    mlp_F: float  # noqa: N815
    mlp_B: float  # noqa: N815
    mlp_W: float  # noqa: N815
    dispatch: float
    combine: float
    coefficients_F: float  # noqa: N815
    coefficients_B: float  # noqa: N815
    pre_F: float  # noqa: N815
    pre_B: float  # noqa: N815
    post_res_F: float  # noqa: N815
    post_res_B: float  # noqa: N815
    recompute: float
    send: float
    recv: float = 0.0
    quantum: float = 0.0
    contention: float = 0.0
    layers: int = 1
    recompute_blocks: int = 1
    attention_preemptible: bool = True
    provenance: str = "given"

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "float":
                value = check_duration(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, value)
        for name in ("layers", "recompute_blocks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.layers % self.recompute_blocks:
            raise ConfigError(
                f"recompute_blocks must divide the stage's {self.layers} layers, got "
                f"{self.recompute_blocks}"
            )
        if not isinstance(self.attention_preemptible, bool):
            raise ConfigError(
                f"attention_preemptible must be a bool, got {self.attention_preemptible!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-safe."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> OpCosts:
        """Reads a table with the fields' names.

        Raises:
            ConfigError: a name is unknown or missing.
        """
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(table) - set(names)):
            raise ConfigError(f"op costs have no {unknown[0]!r}; names: {', '.join(names)}")
        required = names[: names.index("recv")]
        if missing := [name for name in required if name not in table]:
            raise ConfigError(f"op costs must give {', '.join(missing)} too")
        return cls(**table)


def is_op_table(costs: Mapping[str, Any]) -> bool:
    """Whether the names in `costs` are those of ops, not of actions."""
    return any(field.name in costs for field in fields(OpCosts))


def model_op_costs(
    *,
    hidden: int,
    tokens: int,
    streams: int = 4,
    layers: int = 1,
    expert_hidden: int = 2048,
    active_experts: int = 8,
    itemsize: int = 2,
    tflops: float = 400.0,
    memory_gbs: float = 2500.0,
    link_gbs: float = 40.0,
    all_to_all_gbs: float = 160.0,
    contention: float = 0.0,
) -> OpCosts:
    """Models a mixture-of-experts layer from work and traffic alone; no measurement is in it.

    Matrix products at `tflops`, mHC ops at `memory_gbs` with the traffic of the paper's kernels
    (Tab. 2 and Sec. 4.3.1: coefficients nC, pre nC + C, post and res (2n + 1)C elements a token,
    backward twice as much), all-to-alls and messages at their rates, no fixed costs.

    Args:
        hidden: C.
        tokens: of a microbatch on a rank.
        streams: n; a stage's boundary has n C elements a token.
        layers: of a stage.
        expert_hidden: the inner width of an expert.
        active_experts: experts a token goes to.
        itemsize: bytes of an element.
        tflops: reached by matrix products.
        memory_gbs: GB/s reached by mHC's kernels.
        link_gbs: GB/s between neighbouring ranks of the pipeline.
        all_to_all_gbs: GB/s of a rank's all-to-all.
        contention: see `OpCosts`.

    Returns:
        The table, provenance "modelled".
    """
    for name, value in (("hidden", hidden), ("tokens", tokens), ("streams", streams)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    for name, rate in (
        ("tflops", tflops), ("memory_gbs", memory_gbs), ("link_gbs", link_gbs),
        ("all_to_all_gbs", all_to_all_gbs),
    ):  # fmt: skip
        if check_duration(name, rate) == 0:
            raise ConfigError(f"{name} must be greater than 0")

    def products(flops: float) -> float:
        return flops / tflops * 1e-6

    def moves(elements: float, gbs: float) -> float:
        return elements * tokens * itemsize / gbs * 1e-3

    attention = products(tokens * (8 * hidden**2 + 2 * tokens * hidden))  # causal: half of 4 T C
    mlp = products(tokens * active_experts * 6 * hidden * expert_hidden)
    coefficients = moves(streams * hidden, memory_gbs)
    pre = moves((streams + 1) * hidden, memory_gbs)
    post_res = moves((2 * streams + 1) * hidden, memory_gbs)
    return OpCosts(
        attention_F=attention, attention_B=attention, attention_W=attention,
        mlp_F=mlp, mlp_B=mlp, mlp_W=mlp,
        dispatch=moves(active_experts * hidden, all_to_all_gbs),
        combine=moves(active_experts * hidden, all_to_all_gbs),
        coefficients_F=coefficients, coefficients_B=2 * coefficients,
        pre_F=pre, pre_B=2 * pre, post_res_F=post_res, post_res_B=2 * post_res,
        recompute=2 * (pre + post_res), send=moves(streams * hidden, link_gbs),
        contention=contention, layers=layers, provenance="modelled",
        quantum=attention / 32,
    )  # fmt: skip
