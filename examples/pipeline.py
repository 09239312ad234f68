"""A pipeline plan on torch.distributed, beside the same model on one process.

On CPUs, or on two GPUs, one per rank:

    torchrun --nproc-per-node 2 examples/pipeline.py
    torchrun --nproc-per-node 2 examples/pipeline.py --variant zb1p --recompute --compile
"""

import argparse
import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mhc_compile as mc

WIDTH, VOCABULARY, LENGTH, ROWS = 64, 256, 32, 2


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def attention(self, x: Tensor) -> Tensor:
        """Causal attention with four heads."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """Two residual adds."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Blocks between an embedding and a head that share their weight."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the next byte."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(scores: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of one microbatch."""
    return nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())


def difference(runner: mc.PlanRunner, serial: nn.Module) -> float:
    """The largest difference of a gradient on this rank, relative to the largest gradient."""
    goals = {name: p.grad for name, p in serial.named_parameters() if p.grad is not None}
    goals["head.weight"] = goals["embed.weight"]  # one parameter with two names
    largest = max(float(goal.abs().max()) for goal in goals.values())
    return max(
        float((p.grad - goals[name]).abs().max()) / largest
        for module in runner.modules.values()
        for name, p in module.named_parameters() if p.grad is not None
    )  # fmt: skip


def main() -> None:
    """Trains a few steps on every rank and compares with the model on one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", default="dualpipev", help="dualpipev, zb1p or 1f1b")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--recompute", action="store_true", help="each block in the backward")
    parser.add_argument("--compile", action="store_true", help="stages with backend='mhc'")
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights and batches on every rank
    plan = mc.plan_pipeline(ranks, arguments.microbatches, variant=arguments.variant)
    model = GPT(2 * plan.layout.stages).to(device)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), device=device)
    mc.transform(model, example_inputs=(ids,), streams=4)
    serial = copy.deepcopy(model)

    stages = mc.split_stages(model.train(), plan, (ids,), recompute=arguments.recompute)
    if arguments.compile:
        for stage, _ in plan.layout.slots(rank):
            stages[stage].compile(backend="mhc")
    runner = mc.PlanRunner(plan, stages, loss_fn)
    if rank == 0:
        print(f"{plan.variant}, {ranks} ranks, {plan.microbatches} microbatches\n{stages}")

    ours = torch.optim.SGD(runner.parameters(), lr=0.2)
    theirs = torch.optim.SGD(serial.parameters(), lr=0.2)
    text = torch.arange(LENGTH + 1).repeat(ROWS * plan.microbatches, 1) * 7 % VOCABULARY
    text = (text + torch.arange(len(text))[:, None]).to(device) % VOCABULARY
    batch, target = text[:, :-1], text[:, 1:]
    for step in range(arguments.steps):
        loss = runner.step((batch,), target)
        alone = 0.0
        for rows, goal in zip(batch.split(ROWS), target.split(ROWS), strict=True):
            part = loss_fn(serial(rows), goal) / plan.microbatches
            part.backward()
            alone += part.item()
        worst = torch.tensor(difference(runner, serial), device=device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.6f}, on one process {alone:.6f}, "
                  f"gradients differ by {worst.item():.1e}")  # fmt: skip
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    dist.destroy_process_group()


main()
