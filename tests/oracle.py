"""A hand-written mHC loop that shares no code with the library.

Streams are a Python list, coefficients are lists of tensors with one value a token, and
Sinkhorn-Knopp is spelt out for each convention.
"""

import torch


def divide_columns(m, eps=0.0):
    n = len(m)
    sums = [sum(m[i][j] for i in range(n)) + eps for j in range(n)]
    return [[m[i][j] / sums[j] for j in range(n)] for i in range(n)]


def divide_rows(m, eps=0.0):
    return [[value / (sum(row) + eps) for value in row] for row in m]


def sinkhorn(z, convention):
    """res[out][in] from logits in the convention's own order, each as published."""
    n = len(z)
    m = [[value.exp() for value in row] for row in z]
    if convention == "paper":
        for _ in range(20):
            m = divide_rows(divide_columns(m))
    elif convention == "transformer_engine":
        for _ in range(20):
            m = divide_columns(divide_rows(m))
    else:
        m = divide_columns([[value + 1e-6 for value in row] for row in divide_rows(m)], 1e-6)
        for _ in range((10 if convention == "tilekernels" else 20) - 1):
            m = divide_columns(divide_rows(m, 1e-6), 1e-6)
    if convention in ("deepseek_v4", "tilekernels", "transformer_engine"):
        return [[m[i][j] for i in range(n)] for j in range(n)]
    return m


def mhc_maps(streams, phi, alpha, bias, convention):
    n = len(streams)
    flat = torch.cat(streams, dim=-1)
    eps = {"paper": 1e-20, "transformer_engine": 2.0**-23}.get(convention, 1e-6)
    root = (flat.pow(2).sum(-1) / flat.shape[-1] + eps).sqrt()

    def logit(column, gate):
        return alpha[gate] * (flat * phi[:, column]).sum(-1) / root + bias[column]

    pre_eps = 1e-6 if convention in ("deepseek_v4", "tilekernels") else 0.0
    factor = 1.0 if convention == "tilekernels" else 2.0
    pre = [1 / (1 + (-logit(i, 0)).exp()) + pre_eps for i in range(n)]
    post = [factor / (1 + (-logit(n + i, 1)).exp()) for i in range(n)]
    z = [[logit(2 * n + n * i + j, 2) for j in range(n)] for i in range(n)]
    return pre, post, sinkhorn(z, convention)


def hc_maps(streams, phi, alpha, bias, _):
    n = len(streams)
    normed = [x / (x.pow(2).mean(-1, keepdim=True) + 1e-20).sqrt() for x in streams]

    def score(j, column):
        return torch.tanh((normed[j] * phi[:, column]).sum(-1))

    pre = [alpha[0] * score(i, 0) + bias[i] for i in range(n)]
    post = [alpha[1] * score(i, 1) + bias[n + i] for i in range(n)]
    res = [
        [alpha[2] * score(j, 2 + i) + bias[2 * n + n * i + j] for j in range(n)] for i in range(n)
    ]
    return pre, post, res


class Loop:
    """Runs sublayers on n streams with the parameters of a transformed model."""

    def __init__(self, transformed, n, connection="mhc", convention="paper"):
        self.state = transformed.state_dict()
        self.n, self.convention = n, convention
        self.maps = mhc_maps if connection == "mhc" else hc_maps

    def step(self, name, streams, sublayer, scale=None, sign=1):
        """One connection: `scale * x` is mixed, F(h) with `sign` is added."""
        arguments = [self.state[f"{name}.{key}"] for key in ("phi", "alpha", "bias")]
        pre, post, res = self.maps(streams, *arguments, self.convention)
        h = sum(p.unsqueeze(-1) * s for p, s in zip(pre, streams, strict=True))
        f = sign * sublayer(h)
        if scale is not None:
            streams = [scale * s for s in streams]
        return [
            sum(r.unsqueeze(-1) * s for r, s in zip(row, streams, strict=True))
            + p.unsqueeze(-1) * f
            for row, p in zip(res, post, strict=True)
        ]

    def collapse(self, name, streams):
        weight = self.state[f"{name}.collapse.weight"]
        return sum(w * s for w, s in zip(weight, streams, strict=True))

    def __call__(self, x, sublayers):
        """`sublayers` are `(connection's name, F, norm on the stream or None)`."""
        streams = [x] * self.n
        for name, sublayer, norm in sublayers:
            streams = self.step(name, streams, sublayer)
            if norm is not None:
                streams = [norm(s) for s in streams]
        return self.collapse(sublayers[-1][0].rsplit(".", 1)[0], streams)
