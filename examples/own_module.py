"""mHC in a model of your own: transform it, then train it as before."""

import torch
from torch import nn

import mhc_compile as mc


class Block(nn.Module):
    """A pre-norm transformer block, written without a thought of mHC."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two residual adds: these are what mHC replaces."""
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(50, 64), Block(64, 4), Block(64, 4), nn.Linear(64, 50))
ids = torch.arange(32).repeat(8, 2) % 50

for site in mc.find_residuals(model, (ids,)):
    print(f"{site.name:<14} {site.source:<20} stream {site.stream}, C = {site.channels}")

mc.transform(model, example_inputs=(ids,), streams=4)
connections = [p for _, p in mc.mhc_parameters(model)]
rest = [p for p in model.parameters() if all(p is not q for q in connections)]
optimizer = torch.optim.AdamW(rest, lr=1e-3)
optimizer.add_param_group({"params": connections, "weight_decay": 0.0})

for step in range(30):
    logits = model(ids[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.4f}")

print(mc.stability(model, ids))
