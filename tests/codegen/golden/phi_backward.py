# mhc_compile kernel phi_backward 5e5749fdfbe65c67
# {"again": false, "carry": false, "channels": 64, "dtype": "fp32", "equal": false, "mix": false, "norm": "none", "op": "phi_backward", "products": "tf32x3", "rule": {"name": "paper", "norm_eps": 1e-20, "norm_eps_place": "inside", "post_multiplier": 2.0, "pre_eps": 0.0, "res_transposed": false, "sinkhorn_eps": 0.0, "sinkhorn_eps_mode": "none", "sinkhorn_iters": 20, "sinkhorn_order": "col_row", "sinkhorn_start": "exp", "sinkhorn_start_is_step": false}, "shift": false, "streams": 2, "target": "cuda", "tile": {"flat": false, "gated": 1, "inner": 64, "joined": 1, "parts": 1, "registers": 0, "shares": 1, "stages": 3, "tokens": 32, "warps": 4, "width": 128}, "weight": false}
# phi_shares[group, channel, k] = sum over the group's tokens of vec(y)_channel dh_k
import triton
import triton.language as tl


@triton.jit
def mhc_phi_backward(y, dh_high, dh_low, phi_shares, tokens, group_tokens):
    channel = tl.program_id(0) * 128 + tl.arange(0, 128)
    near = channel[None, :] < 128
    columns0 = tl.arange(0, 16)
    sums0 = tl.zeros((16, 128), tl.float32)
    begin = tl.program_id(1) * group_tokens
    for start in tl.range(0, group_tokens, 32, num_stages=3):
        rows = begin + start + tl.arange(0, 32)
        inside = rows < tokens
        wide = rows.to(tl.int64)[:, None]
        value = tl.load(y + wide * 128 + channel[None, :], mask=inside[:, None] & near, other=0.0)
        index = wide * 16 + columns0[None, :]
        high = tl.load(dh_high + index, mask=inside[:, None], other=0.0)
        sums0 = tl.dot(tl.trans(high), value.to(tl.float32), sums0, input_precision="tf32x3")
    line = (tl.program_id(1) * 128 + channel[:, None]) * 8
    known = (channel[:, None] < 128) & (columns0[None, :] < 8)
    tl.store(phi_shares + line + columns0[None, :], tl.trans(sums0), mask=known)
