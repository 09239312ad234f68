"""The formula for the true peak against a memory simulated event by event."""

import numpy as np
import pytest
from brute_force import Instance, compositions, simulate, timeline
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.scheduler import evaluate_blocks, solve_recompute


def random_instance(seed, layers):
    generator = np.random.default_rng(seed)
    T, A = generator.integers(1, 20, layers), generator.integers(0, 25, layers)
    m, H = int(generator.integers(1, 5)), int(generator.integers(0, 40))
    G, J = (), int(generator.integers(0, 40))
    if m == 1:
        G = tuple(generator.integers(0, 50, layers).tolist())
    return Instance(4, tuple(T.tolist()), tuple(A.tolist()), m, H, G, J)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_every_cut(seed, layers):
    stage = random_instance(seed, layers)
    for sizes in compositions(layers):
        plan = evaluate_blocks(sizes, layers, 4, objective="timeline", **stage.arguments)
        assert plan.cost == plan.peak == timeline(stage, sizes) == simulate(stage, sizes)
        (row,) = plan.stages
        assert row.peak == row.boundaries + row.kept + row.transient + row.head + row.gradients


@pytest.mark.parametrize("seed", range(4))
def test_optimum_in_the_simulated_memory(seed):
    stage = random_instance(seed, 9)
    plan = solve_recompute(9, 4, objective="timeline", **stage.arguments)
    peaks = {sizes: simulate(stage, sizes) for sizes in compositions(9)}
    assert peaks[plan.block_sizes] == min(peaks.values()) == plan.peak
