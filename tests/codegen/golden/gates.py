# mhc_compile kernel gates bc207d7b9799e094
# {"channels": 64, "dtype": "bf16", "mix": false, "norm": "none", "op": "gates", "products": "split", "read": false, "rule": {"name": "deepseek_v4", "norm_eps": 1e-06, "norm_eps_place": "inside", "post_multiplier": 2.0, "pre_eps": 1e-06, "res_transposed": true, "sinkhorn_eps": 1e-06, "sinkhorn_eps_mode": "add", "sinkhorn_iters": 20, "sinkhorn_order": "row_col", "sinkhorn_start": "softmax", "sinkhorn_start_is_step": true}, "shift": false, "streams": 2, "target": "cuda", "tile": {"parts": 1, "stages": 1, "tokens": 32, "warps": 1, "width": 1}, "weight": false}
# proj_k = sum over parts of partial_k, square = the same of the squares   (Eq. 14)
# z = alpha * proj / r + bias, r = sqrt(square / (nC) + eps)   (Eq. 15, 16)
# pre = sigmoid(z) + pre_eps, post = multiplier * sigmoid(z), res = SinkhornKnopp(z)   (Eq. 17-19)
import triton
import triton.language as tl


@triton.jit
def kernel(partial, alpha, bias, pre, post, res, proj, square, tokens):
    begin = tl.cast(tl.program_id(0), tl.int64) * 32
    step = tl.cast(tokens, tl.int64)
    rows = tl.arange(0, 32)
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
    total = tl.load(partial + 8 * step + rows)
    product = tl.load(partial + place, mask=column < 8, other=0.0)
    for part in range(1, 1):
        partial += 9 * step
        total += tl.load(partial + 8 * step + rows)
        product += tl.load(partial + place, mask=column < 8, other=0.0)
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
    logit0, logit1 = tl.split(tl.reshape(logit, (32, 8, 2)))
    logit00, logit01 = tl.split(tl.reshape(logit0, (32, 4, 2)))
    logit000, logit001 = tl.split(tl.reshape(logit00, (32, 2, 2)))
    logit0010, logit0011 = tl.split(tl.reshape(logit001, (32, 1, 2)))
    z00 = tl.reshape(logit0010, (32,))
    logit010, logit011 = tl.split(tl.reshape(logit01, (32, 2, 2)))
    logit0110, logit0111 = tl.split(tl.reshape(logit011, (32, 1, 2)))
    z10 = tl.reshape(logit0110, (32,))
    logit10, logit11 = tl.split(tl.reshape(logit1, (32, 4, 2)))
    logit100, logit101 = tl.split(tl.reshape(logit10, (32, 2, 2)))
    logit1010, logit1011 = tl.split(tl.reshape(logit101, (32, 1, 2)))
    z01 = tl.reshape(logit1010, (32,))
    logit110, logit111 = tl.split(tl.reshape(logit11, (32, 2, 2)))
    logit1110, logit1111 = tl.split(tl.reshape(logit111, (32, 1, 2)))
    z11 = tl.reshape(logit1110, (32,))
    top = tl.maximum(z00, z01)
    total = tl.exp(z00 - top) + tl.exp(z01 - top)
    top += tl.log(total)
    z00 -= top
    z01 -= top
    top = tl.maximum(z10, z11)
    total = tl.exp(z10 - top) + tl.exp(z11 - top)
    top += tl.log(total)
    z10 -= top
    z11 -= top
    e00 = tl.exp(z00) + 1e-06
    e01 = tl.exp(z01) + 1e-06
    e10 = tl.exp(z10) + 1e-06
    e11 = tl.exp(z11) + 1e-06
    row0 = tl.full((32,), 1.0, tl.float32)
    col0 = tl.full((32,), 1.0, tl.float32)
    row1 = tl.full((32,), 1.0, tl.float32)
    col1 = tl.full((32,), 1.0, tl.float32)
    total = col0 * (e00 * row0 + e10 * row1)
    col0 = col0 / (total + 1e-06)
    total = col1 * (e01 * row0 + e11 * row1)
    col1 = col1 / (total + 1e-06)
    for _ in range(19):
        total = row0 * (e00 * col0 + e01 * col1)
        row0 = row0 / (total + 1e-06)
        total = row1 * (e10 * col0 + e11 * col1)
        row1 = row1 / (total + 1e-06)
        total = col0 * (e00 * row0 + e10 * row1)
        col0 = col0 / (total + 1e-06)
        total = col1 * (e01 * row0 + e11 * row1)
        col1 = col1 / (total + 1e-06)
    m00 = row0 * e00 * col0
    m10 = row0 * e01 * col1
    m01 = row1 * e10 * col0
    m11 = row1 * e11 * col1
    zero = tl.zeros((32,), tl.float32)
    matrix = tl.reshape(tl.join(tl.join(m00, m10), tl.join(m01, m11)), (32, 4))
    entry = tl.arange(0, 4)[None, :]
    tl.store(res + entry * step + rows[:, None], matrix, mask=inside[:, None] & (entry < 4))
