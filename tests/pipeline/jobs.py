"""What ranks do in tests: `python jobs.py JSON` on each, see `launch`."""

import contextlib
import copy
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fake_streams import fake_streams

import mhc_compile as mc

FOLDER = Path(os.environ.get("RANK_FOLDER", "."))
RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
ROWS = 2  # of a microbatch


def build(name, blocks):
    """A transformed model whose connections have left their start, and its constant inputs."""
    torch.manual_seed(0)
    if name == "nanogpt":
        model = models.NanoGPT(depth=blocks)
    else:
        model = models.ARCHITECTURES[name].build()
    mc.transform(model, example_inputs=models.ARCHITECTURES[name].inputs(), streams=4)
    constants = {"use_cache": False} if name in ("gpt2", "llama", "qwen3_moe", "t5") else {}
    return models.perturb(model).train(), constants


def loss_of(result, target):
    scores = result if isinstance(result, torch.Tensor) else result.logits
    return F.cross_entropy(scores.flatten(0, 1), target[:, : scores.shape[1]].flatten())


def prepare(
    model, variant, microbatches, compile=None, timeout=60, change=None, times=None, **split
):
    """A runner of a model on this rank, the serial model, and a batch with its target."""
    plan = mc.plan_pipeline(RANKS, microbatches, variant=variant, costs=times)
    inputs = models.ARCHITECTURES[model].inputs
    net, constants = build(model, plan.layout.stages)
    serial = copy.deepcopy(net)
    stages = mc.split_stages(net, plan, {**inputs(ROWS), **constants}, **split)
    if compile is not None:
        for number, _ in plan.layout.slots(RANK):
            stages[number].compile(backend="mhc", options=compile)
    if change is not None:
        change(plan, stages)
    runner = mc.PlanRunner(plan, stages, loss_of, timeout=timeout)
    batch = inputs(ROWS * microbatches)
    return runner, serial, {**batch, **constants}, models.tokens(ROWS * microbatches, seed=5)


def train(model, variant, microbatches, **options):
    """One step; how far loss and gradients are from the serial model's, and what ran how often."""
    runner, serial, batch, target = prepare(model, variant, microbatches, **options)
    calls = count_calls(runner)
    started = time.monotonic()
    loss = runner.step(batch, target)
    seconds = time.monotonic() - started
    wanted = 0.0
    for k in range(microbatches):
        rows = slice(ROWS * k, ROWS * (k + 1))
        part = {n: v[rows] if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
        each = loss_of(serial(**part), target[rows]) / microbatches
        each.backward()
        wanted += each.item()
    largest = max(float(p.grad.abs().max()) for p in serial.parameters() if p.grad is not None)
    worst, silent = 0.0, []
    for module in runner.modules.values():
        for name, parameter in module.named_parameters():
            goal = serial.get_parameter(name).grad
            if parameter.grad is None or goal is None:
                silent += [name] if parameter.grad is not goal else []
                continue
            scale = max(float(goal.abs().max()), 1e-2 * largest)
            worst = max(worst, float((parameter.grad - goal).abs().max()) / scale)
    return {
        "loss": abs(float(loss) - wanted) / wanted, "gradient": worst, "silent": silent,
        "calls": calls, "seconds": seconds,
    }  # fmt: skip


def count_calls(runner):
    """Counts the forwards of each block's MLP from now on, recomputed ones too."""
    calls = {}

    def counted(name):
        def hook(*_):
            calls[name] = calls.get(name, 0) + 1

        return hook

    for module in runner.modules.values():
        for name, child in module.named_modules():
            if name.endswith("mlp"):
                child.register_forward_hook(counted(name))
    return calls


def order_of_events(variant, microbatches):
    """Starts and ends of chunks, waits and posted sends on this rank, in order."""
    runner, _, batch, target = prepare("nanogpt", variant, microbatches, recompute=True)
    events, held, compute, send = [], [0], runner._compute, runner._send
    wait = runner._wait

    @contextlib.contextmanager
    def noted(action):
        events.append(f"begin {action}")
        held.append(sum(bool(stage.tensors_of(k)) for stage in runner._stages.values()
                        for k in range(microbatches)))  # fmt: skip
        with compute(action):
            yield
        events.append(f"end {action}")

    def sent(what, post, chunk):
        events.append(f"send {what}")
        send(what, post, chunk)

    def waited(what, works):
        events.append(f"wait for {what}")
        wait(what, works)

    runner._compute, runner._send, runner._wait = noted, sent, waited
    runner.step(batch, target)
    left = [stage.tensors_of(k) for stage in runner._stages.values() for k in range(microbatches)]
    return {
        "events": events, "plan": runner.plan.actions_as_text()[RANK], "held": max(held),
        "last": runner.plan.layout.stages - 1,
        "in_flight": runner.plan.peak_in_flight[RANK], "left": sum(map(len, left)),
    }  # fmt: skip


def merges(recompute):
    """Where merges of a step run that has a stream of high priority, and whether bits stay."""
    runner, _, batch, target = prepare("nanogpt", "dualpipev", 4, recompute=recompute)
    found, places = [], {}
    with fake_streams() as (stream, log):
        for runner._high_priority in (None, stream):
            log.clear()
            loss = runner.step(batch, target)
            found.append([loss, *(p.grad for p in runner.parameters() if p.grad is not None)])
            for parameter in runner.parameters():
                parameter.grad = None
        for line in log:
            places[line] = places.get(line, 0) + 1
    return {"same": all(map(torch.equal, *found)), "places": places}


def several_steps(variant):
    """Trains with two batches a step; the serial model's losses and this pipeline's."""
    runner, serial, batch, target = prepare("nanogpt", variant, 5)
    losses, wanted = [], []
    ours = torch.optim.SGD(runner.parameters(), lr=0.1)
    theirs = torch.optim.SGD(serial.parameters(), lr=0.1)
    for _ in range(3):
        for idx, goal in ((batch["idx"], target), (batch["idx"].flip(1), target.flip(0))):
            losses.append(float(runner.step({"idx": idx}, goal)))
            loss = loss_of(serial(idx), goal)
            loss.backward()
            wanted.append(loss.item())
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    state = {n: float((t - serial.state_dict()[n]).abs().max())
             for n, t in runner.state_dict().items()}  # fmt: skip
    return {"losses": losses, "wanted": wanted, "state": state}


def message_of(make):
    """The library's error of a call, as text."""
    try:
        make()
    except mc.MHCError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def disagree():
    """Ranks with different plans, then with different stages: what each is told."""
    net, _ = build("nanogpt", 4)
    example = {"idx": models.tokens(ROWS)}
    plan = mc.plan_pipeline(RANKS, 4, variant="1f1b")
    other = mc.plan_pipeline(RANKS, 4 + RANK, variant="1f1b")
    split = mc.split_stages(net, RANKS, example, split=[1, 3] if RANK else [2, 2])
    return {
        "plans": message_of(
            lambda: mc.PlanRunner(other, mc.split_stages(net, plan, example), loss_of)
        ),
        "stages": message_of(lambda: mc.PlanRunner(plan, split, loss_of)),
    }


def fail(how, timeout):
    """Rank 1 fails at the second chunk of its step in a way of its own."""

    def change(plan, stages):
        chunks = []

        def hook(*_):
            chunks.append(1)
            if len(chunks) < 2:
                return
            if how == "dies":
                os._exit(3)
            elif how == "hangs":
                time.sleep(600)
            raise FloatingPointError("the test's own")

        if RANK == 1:
            stages[1].register_forward_pre_hook(hook)

    runner, _, batch, target = prepare("nanogpt", "zb1p", 4, timeout=timeout, change=change)
    start = time.monotonic()
    try:
        runner.step(batch, target)
    except Exception as error:
        seconds = time.monotonic() - start
        write({"error": f"{type(error).__name__}: {error}", "seconds": seconds})
        raise
    return {"error": None}


def absent():
    """Rank 1 never makes a runner."""
    if RANK == 1:
        time.sleep(600)
    try:
        prepare("nanogpt", "1f1b", 2, timeout=3)
    except mc.MHCError as error:
        write({"error": f"{type(error).__name__}: {error}"})
        raise


def refusals():
    """What is refused before anything is sent; then a step goes well."""
    net, _ = build("nanogpt", 4)
    example = {"idx": models.tokens(ROWS)}

    def run(stages, ranks, variant="1f1b"):
        split = mc.split_stages(net, stages, example)
        return lambda: mc.PlanRunner(mc.plan_pipeline(ranks, 4, variant=variant), split, loss_of)

    runner, _, batch, target = prepare("nanogpt", "1f1b", 2)
    idx = batch["idx"]
    found = {
        "dualpipe": message_of(run(2, 2, "dualpipe")),
        "stages": message_of(run(2, 2, "dualpipev")),
        "ranks": message_of(run(4, 4)),
        "batch": message_of(lambda: runner.step({"idx": idx[:3]}, target)),
        "length": message_of(lambda: runner.step({"idx": idx[:, :5]}, target)),
        "name": message_of(lambda: runner.step({"ids": idx}, target)),
        "target": message_of(lambda: runner.step(batch, target[:3])),
    }
    return {**found, "after": float(runner.step(batch, target))}


def write(report):
    (FOLDER / f"report{RANK}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{FOLDER}/store", rank=RANK, world_size=RANKS, timeout=timedelta(seconds=90)
    )
    jobs = json.loads(sys.argv[1])
    write({name: globals()[job](**options) for name, (job, options) in jobs.items()})
    dist.barrier()
    dist.destroy_process_group()
