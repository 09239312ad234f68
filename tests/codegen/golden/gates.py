# mhc_compile kernel gates bc207d7b9799e094
# {"channels": 64, "dtype": "bf16", "mix": false, "norm": "none", "op": "gates", "products": "split", "read": false, "rule": {"name": "deepseek_v4", "norm_eps": 1e-06, "norm_eps_place": "inside", "post_multiplier": 2.0, "pre_eps": 1e-06, "res_transposed": true, "sinkhorn_eps": 1e-06, "sinkhorn_eps_mode": "add", "sinkhorn_iters": 20, "sinkhorn_order": "row_col", "sinkhorn_start": "softmax", "sinkhorn_start_is_step": true}, "shift": false, "streams": 2, "target": "cuda", "tile": {"parts": 1, "stages": 1, "tokens": 32, "warps": 1, "width": 1}, "weight": false}
# proj_k = sum over parts of partial_k, square = the same of the squares   (Eq. 14)
# z = alpha * proj / r + bias, r = sqrt(square / (nC) + eps)   (Eq. 15, 16)
# pre = sigmoid(z) + pre_eps, post = multiplier * sigmoid(z), res = SinkhornKnopp(z)   (Eq. 17-19)
import triton
import triton.language as tl


@triton.jit
def kernel(partial, alpha, bias, pre, post, res, proj, square, tokens):
    step = tl.cast(tokens, tl.int64)
    rows = tl.program_id(0) * 32 + tl.arange(0, 32)
    inside = rows < tokens
    rows = tl.minimum(rows, tokens - 1)
    wide = rows.to(tl.int64)[:, None]

    total = tl.load(partial + 8 * step + rows)
    tl.store(square + rows, total, mask=inside)
    inverse = tl.rsqrt(total / 128 + 1e-06)
    total = tl.load(partial + 0 * step + rows)
    tl.store(proj + 0 * step + rows, total, mask=inside)
    tl.store(pre + 0 * step + rows, tl.sigmoid(total * inverse * tl.load(alpha + 0) + tl.load(bias + 0)) + 1e-06, mask=inside)
    total = tl.load(partial + 1 * step + rows)
    tl.store(proj + 1 * step + rows, total, mask=inside)
    tl.store(pre + 1 * step + rows, tl.sigmoid(total * inverse * tl.load(alpha + 0) + tl.load(bias + 1)) + 1e-06, mask=inside)
    total = tl.load(partial + 2 * step + rows)
    tl.store(proj + 2 * step + rows, total, mask=inside)
    tl.store(post + 0 * step + rows, 2.0 * tl.sigmoid(total * inverse * tl.load(alpha + 1) + tl.load(bias + 2)), mask=inside)
    total = tl.load(partial + 3 * step + rows)
    tl.store(proj + 3 * step + rows, total, mask=inside)
    tl.store(post + 1 * step + rows, 2.0 * tl.sigmoid(total * inverse * tl.load(alpha + 1) + tl.load(bias + 3)), mask=inside)
    total = tl.load(partial + 4 * step + rows)
    tl.store(proj + 4 * step + rows, total, mask=inside)
    z00 = total * inverse * tl.load(alpha + 2) + tl.load(bias + 4)
    total = tl.load(partial + 5 * step + rows)
    tl.store(proj + 5 * step + rows, total, mask=inside)
    z01 = total * inverse * tl.load(alpha + 2) + tl.load(bias + 5)
    total = tl.load(partial + 6 * step + rows)
    tl.store(proj + 6 * step + rows, total, mask=inside)
    z10 = total * inverse * tl.load(alpha + 2) + tl.load(bias + 6)
    total = tl.load(partial + 7 * step + rows)
    tl.store(proj + 7 * step + rows, total, mask=inside)
    z11 = total * inverse * tl.load(alpha + 2) + tl.load(bias + 7)
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
    tl.store(res + 0 * step + rows, row0 * e00 * col0, mask=inside)
    tl.store(res + 2 * step + rows, row0 * e01 * col1, mask=inside)
    tl.store(res + 1 * step + rows, row1 * e10 * col0, mask=inside)
    tl.store(res + 3 * step + rows, row1 * e11 * col1, mask=inside)
