# mhc_compile kernel gates 7a3b68d8e89b306e
# {"again": false, "carry": false, "channels": 64, "dtype": "bf16", "equal": false, "mix": false, "norm": "none", "op": "gates", "products": "split", "rule": {"name": "deepseek_v4", "norm_eps": 1e-06, "norm_eps_place": "inside", "post_multiplier": 2.0, "pre_eps": 1e-06, "res_transposed": true, "sinkhorn_eps": 1e-06, "sinkhorn_eps_mode": "add", "sinkhorn_iters": 20, "sinkhorn_order": "row_col", "sinkhorn_start": "softmax", "sinkhorn_start_is_step": true}, "shift": false, "streams": 2, "target": "cuda", "tile": {"flat": false, "gated": 1, "inner": 64, "joined": 1, "parts": 2, "registers": 0, "shares": 1, "stages": 1, "tokens": 8, "warps": 1, "width": 1}, "weight": false}
# proj_k = sum over parts of partial_k, square = the same of the squares   (Eq. 14)
# z = alpha * proj / r + bias, r = sqrt(square / (nC) + eps)   (Eq. 15, 16)
# pre = sigmoid(z) + pre_eps, post = multiplier * sigmoid(z), res = SinkhornKnopp(z)   (Eq. 17-19)
import triton
import triton.language as tl


@triton.jit
def mhc_gates(partial, alpha, bias, pre, post, res, proj, square, tokens):
    begin = tl.cast(tl.program_id(0), tl.int64) * 8
    step = tl.cast(tokens, tl.int64)
    rows = tl.arange(0, 8)
    inside = rows < step - begin
    rows = tl.minimum(rows, tl.cast(step - begin - 1, tl.int32))
    wide = rows[:, None]
    partial += begin
    pre += begin
    post += begin
    res += begin
    proj += begin
    square += begin
    column = tl.arange(0, 16)[None, :]
    place = column * step + rows[:, None]
    row_index = tl.arange(0, 2)[None, :, None]
    col_index = tl.arange(0, 2)[None, None, :]
    known = (row_index < 2) & (col_index < 2)
    entry = row_index * 2 + col_index
    token = rows[:, None, None]
    inner = (4 + entry) * step + token
    total = tl.load(partial + 8 * step + rows)
    product = tl.load(partial + place, mask=column < 8, other=0.0)
    z = tl.load(partial + inner, mask=known, other=0.0)
    for _ in range(1):
        partial += 9 * step
        total += tl.load(partial + 8 * step + rows)
        product += tl.load(partial + place, mask=column < 8, other=0.0)
        z += tl.load(partial + inner, mask=known, other=0.0)
    tl.store(square + rows, total, mask=inside)
    tl.store(proj + place, product, mask=inside[:, None] & (column < 8))
    inverse = tl.rsqrt(total / 128 + 1e-06)
    alpha_post = tl.where(column < 4, tl.load(alpha + 1), tl.load(alpha + 2))
    alphas = tl.where(column < 2, tl.load(alpha), alpha_post)
    biases = tl.load(bias + column, mask=column < 8, other=0.0)
    normed = product * inverse[:, None]
    logit = normed * alphas + biases
    gate = tl.sigmoid(logit)
    tl.store(pre + place, gate + 1e-06, mask=inside[:, None] & (column < 2))
    here = inside[:, None] & (column >= 2) & (column < 4)
    tl.store(post + place - 2 * step, 2.0 * gate, mask=here)
    z = z * inverse[:, None, None] * tl.load(alpha + 2) + tl.load(bias + 4 + entry, mask=known, other=0.0)
    z = tl.where(known, z, float("-inf"))
    top = tl.max(z, axis=2, keep_dims=True)
    top = tl.where(top > float("-inf"), top, 0.0)
    total = tl.sum(tl.exp(z - top), axis=2, keep_dims=True)
    z = z - top - tl.log(tl.where(total > 0.0, total, 1.0))
    e = tl.where(known, tl.exp(z) + 1e-06, 0.0)
    row = tl.full((8, 2, 1), 1.0, tl.float32)
    col = tl.full((8, 1, 2), 1.0, tl.float32)
    col_sum = col * tl.sum(e * row, axis=1, keep_dims=True)
    col = col / (col_sum + 1e-06)
    for _ in range(19):
        row_sum = row * tl.sum(e * col, axis=2, keep_dims=True)
        row = row / (row_sum + 1e-06)
        col_sum = col * tl.sum(e * row, axis=1, keep_dims=True)
        col = col / (col_sum + 1e-06)
    entry = col_index * 2 + row_index
    tl.store(res + entry * step + token, row * e * col, mask=known & inside[:, None, None])
