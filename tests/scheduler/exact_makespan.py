"""The least makespan of ops on their servers by constraint programming; needs ortools.

No contention, whole durations. A preemptible compute op is a chain of pieces of one quantum;
between its first and its last piece only hp ops may have the SMs.
"""


def least_makespan(problem, seconds=20, hint=None):
    """Returns (makespan, whether it is proven)."""
    from ortools.sat.python import cp_model  # here: pytest imports this file for its doctests

    model = cp_model.CpModel()
    durations = [int(op.duration) for op in problem.ops]
    assert all(a == op.duration for a, op in zip(durations, problem.ops, strict=True))
    assert problem.contention == 0
    horizon = hint or sum(durations)
    starts = [model.new_int_var(0, horizon, "") for _ in durations]
    ends = [model.new_int_var(0, horizon, "") for _ in durations]
    by_server, sms = {}, []
    interrupted = any(op.server == "hp" for op in problem.ops)
    for op, start, end, duration in zip(problem.ops, starts, ends, durations, strict=True):
        split = op.server == "compute" and op.preemptible and interrupted
        pieces = int(-(-duration // problem.quantum)) if split and problem.quantum else 1
        if pieces > 1:
            length = model.new_int_var(duration, horizon, "")
            span = model.new_interval_var(start, length, end, "")
            before = start
            for i in range(pieces):
                size = min(int(problem.quantum), duration - i * int(problem.quantum))
                at = start if i == 0 else model.new_int_var(0, horizon, "")
                if i:
                    model.add(at >= before)
                before = at + size
                sms.append(model.new_fixed_size_interval_var(at, size, ""))
            model.add(end == before)
        else:
            span = model.new_interval_var(start, duration, end, "")
            if op.server in ("compute", "hp"):
                sms.append(span)
        by_server.setdefault(op.server, []).append(span)
    for spans in by_server.values():
        model.add_no_overlap(spans)
    model.add_no_overlap(sms)
    for i, deps in enumerate(problem.deps):
        for dep in deps:
            model.add(starts[i] >= ends[dep])
    makespan = model.new_int_var(0, horizon, "")
    model.add_max_equality(makespan, ends)
    model.minimize(makespan)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return solver.objective_value, status == cp_model.OPTIMAL
