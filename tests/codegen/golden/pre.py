# mhc_compile kernel pre 7e7e18473218b6ce
# {"again": false, "carry": false, "channels": 64, "dtype": "bf16", "equal": false, "mix": false, "norm": "none", "op": "pre", "products": "split", "rule": {"name": "paper", "norm_eps": 1e-20, "norm_eps_place": "inside", "post_multiplier": 2.0, "pre_eps": 0.0, "res_transposed": false, "sinkhorn_eps": 0.0, "sinkhorn_eps_mode": "none", "sinkhorn_iters": 20, "sinkhorn_order": "col_row", "sinkhorn_start": "exp", "sinkhorn_start_is_step": false}, "shift": false, "streams": 2, "target": "cuda", "tile": {"flat": false, "gated": 1, "inner": 64, "joined": 1, "parts": 1, "registers": 0, "shares": 1, "stages": 1, "tokens": 4, "warps": 4, "width": 64}, "weight": false}
# h = sum_i pre_i x_i
import triton
import triton.language as tl


@triton.jit
def mhc_pre(x, pre, weight, shift, h, tokens, eps):
    part = tl.program_id(0) % 1
    tile = tl.program_id(0) // 1
    begin = tl.cast(tile, tl.int64) * 4
    step = tl.cast(tokens, tl.int64)
    rows = tl.arange(0, 4)
    inside = rows < step - begin
    rows = tl.minimum(rows, tl.cast(step - begin - 1, tl.int32))
    wide = rows[:, None]
    x += begin * 128
    h += begin * 64
    pre += begin
    pre0 = tl.load(pre + 0 * step + rows)
    pre1 = tl.load(pre + 1 * step + rows)
    channel = part * 64 + tl.arange(0, 64)
    place = wide * 128 + channel[None, :]
    value = pre0[:, None] * tl.load(x + place).to(tl.float32)
    value += pre1[:, None] * tl.load(x + place + 64).to(tl.float32)
    tl.store(h + wide * 64 + channel[None, :], value.to(tl.bfloat16), mask=inside[:, None])
