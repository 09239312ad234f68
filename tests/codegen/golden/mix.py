# mhc_compile kernel mix e9fb78a8c37c8099
# {"again": false, "carry": false, "channels": 72, "dtype": "bf16", "equal": false, "mix": false, "norm": "none", "op": "mix", "products": "split", "rule": {"name": "paper", "norm_eps": 1e-20, "norm_eps_place": "inside", "post_multiplier": 2.0, "pre_eps": 0.0, "res_transposed": false, "sinkhorn_eps": 0.0, "sinkhorn_eps_mode": "none", "sinkhorn_iters": 20, "sinkhorn_order": "col_row", "sinkhorn_start": "exp", "sinkhorn_start_is_step": false}, "shift": false, "streams": 2, "target": "cuda", "tile": {"flat": false, "gated": 1, "inner": 64, "joined": 1, "parts": 1, "registers": 0, "shares": 1, "stages": 1, "tokens": 4, "warps": 4, "width": 128}, "weight": false}
# y_i = sum_j res_ij x_j + post_i f   (Eq. 3)
import triton
import triton.language as tl


@triton.jit
def mhc_mix(x, f, post, res, y, tokens):
    part = tl.program_id(0) % 1
    tile = tl.program_id(0) // 1
    begin = tl.cast(tile, tl.int64) * 4
    step = tl.cast(tokens, tl.int64)
    rows = tl.arange(0, 4)
    inside = rows < step - begin
    rows = tl.minimum(rows, tl.cast(step - begin - 1, tl.int32))
    wide = rows[:, None]
    x += begin * 144
    f += begin * 72
    y += begin * 144
    post += begin
    res += begin
    # Strips of few tokens and many channels stream at the rate of the memory.
    for first in range(0, 4, 4):
        strip = first + tl.arange(0, 4)
        there = (strip < step - begin)[:, None]
        strip = tl.minimum(strip, tl.cast(step - begin - 1, tl.int32))
        for start in range(0, 128, 128):
            channel = part * 128 + start + tl.arange(0, 128)[None, :]
            near = channel < 72
            place = strip[:, None] * 144 + channel
            x0 = tl.load(x + place + 0, mask=near, other=0.0).to(tl.float32)
            x1 = tl.load(x + place + 72, mask=near, other=0.0).to(tl.float32)
            f0 = tl.load(f + strip[:, None] * 72 + channel, mask=near, other=0.0).to(tl.float32)
            value = tl.load(post + 0 * step + strip)[:, None] * f0
            value += tl.load(res + 0 * step + strip)[:, None] * x0
            value += tl.load(res + 1 * step + strip)[:, None] * x1
            value = value.to(tl.bfloat16)
            tl.store(y + place + 0, value, mask=there & near)
            value = tl.load(post + 1 * step + strip)[:, None] * f0
            value += tl.load(res + 2 * step + strip)[:, None] * x0
            value += tl.load(res + 3 * step + strip)[:, None] * x1
            value = value.to(tl.bfloat16)
            tl.store(y + place + 72, value, mask=there & near)
