"""Finds the norm that a sublayer starts with, as a module's call or written out in torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from mhc_compile.backend.graph_nodes import call_name, dtype_of, value_of

_CASTS = ("to", "float", "type", "type_as", "half", "bfloat16", "double")


class NormMatch(NamedTuple):
    """A norm of h: what `torch.ops.mhc.seam` takes, and the node that computes its result.

    `kind` is "rms" or "layer", `weight` and `shift` are nodes of `[C]` or None.
    """

    kind: str
    weight: Node | None
    shift: Node | None
    eps: float
    result: Node


def match_norm(h: Node) -> NormMatch | str:
    """Returns the norm that is all that happens to `h: [..., C]`, or why there is none."""
    only = _only_user(h)
    found: NormMatch | None = None
    if only is not None and call_name(only) in ("layer_norm", "rms_norm"):
        found = _match_call(h, only)
    else:
        found = _match_written_out(h)
    if found is None:
        return "no norm that the kernels know follows, or what it reads is read elsewhere too"
    if dtype_of(found.result) != dtype_of(h):
        return f"the norm's result is {dtype_of(found.result)}, its argument {dtype_of(h)}"
    return found


def _match_call(h: Node, call: Node) -> NormMatch | None:
    """layer_norm(h, (C,), weight, bias, eps) or rms_norm(h, (C,), weight, eps)."""
    value = value_of(h)
    kind = "layer" if call_name(call) == "layer_norm" else "rms"
    names = ["input", "normalized_shape", "weight", *(["bias"] if kind == "layer" else []), "eps"]
    given: dict[str, Any] = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    shape = given.get("normalized_shape")
    shape = (shape,) if isinstance(shape, int) else tuple(shape or ())
    eps = given.get("eps", 1e-5 if kind == "layer" else None)
    if eps is None and value is not None and value.dtype in (torch.float32, torch.float64):
        eps = torch.finfo(value.dtype).eps
    eps = _number(eps)
    if value is None or call.args[0] is not h or shape != (value.shape[-1],) or eps is None:
        return None
    return NormMatch(kind, given.get("weight"), given.get("bias"), eps, call)


def _match_written_out(h: Node) -> NormMatch | None:
    """H / sqrt(mean(h^2) + eps), then casts and a product with a weight; h may be cast before."""
    casts = [user for user in _readers(h) if call_name(user) in _CASTS and user.args[0] is h]
    forms = {h, *casts}
    readers = {user for form in forms for user in _readers(form)} - set(casts)
    square = next((user for user in readers if _is_square(user, forms)), None)
    mean = _only_user(square)
    if mean is None or call_name(mean) != "mean" or not _over_last(mean, h):
        return None
    total = _only_user(mean)
    eps = _constant_added(total, mean) if total is not None else None
    if total is None or eps is None:
        return None
    inverse = _only_user(total)
    name = call_name(inverse) if inverse is not None else ""
    if inverse is None or name not in ("rsqrt", "sqrt"):
        return None
    normed = _only_user(inverse)
    if normed is None or readers != {square, normed}:
        return None
    first, second = normed.args[:2]
    if call_name(normed) == "mul" and name == "rsqrt":
        scaled = first in forms if second is inverse else second in forms
    else:
        quotient = call_name(normed) in ("div", "truediv") and name == "sqrt"
        scaled = quotient and first in forms and second is inverse
    if not scaled:
        return None
    weight, result = _weighted(normed, h)
    return NormMatch("rms", weight, None, eps, result)


def _weighted(normed: Node, h: Node) -> tuple[Node | None, Node]:
    """Follows casts and at most one product with a weight to the last result of h's dtype."""
    width = value_of(h)
    weight: Node | None = None
    found: tuple[Node | None, Node] = (None, normed)
    node: Node | None = normed
    while node is not None:
        if dtype_of(node) == dtype_of(h):
            found = weight, node
        after = _only_user(node)
        if after is None:
            break
        if call_name(after) in _CASTS and after.args[0] is node:
            node = after
        elif call_name(after) == "mul" and weight is None and len(after.args) == 2:
            other = after.args[0] if after.args[1] is node else after.args[1]
            value = value_of(other)
            if value is None or width is None or value.shape != width.shape[-1:]:
                break
            weight, node = other, after  # type: ignore[assignment]
        else:
            break
    return found


def _only_user(node: Node | None) -> Node | None:
    users = [] if node is None else _readers(node)
    return users[0] if len(users) == 1 else None


def _readers(node: Node) -> list[Node]:
    """The users of a node's values, without those that only take its dtype."""
    return [u for u in node.users if not (call_name(u) == "type_as" and u.args[0] is not node)]


def _is_square(node: Node, forms: set[Node]) -> bool:
    name, args = call_name(node), node.args
    if name == "pow":
        return args[0] in forms and len(args) == 2 and bool(args[1] == 2)
    if name == "square":
        return args[0] in forms
    return name == "mul" and args[0] in forms and args[1] in forms


def _over_last(mean: Node, h: Node) -> bool:
    value = value_of(h)
    dims = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
    keep = mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim", False)
    listed = list(dims) if isinstance(dims, tuple | list) else [dims]
    last = [-1] if value is None else [-1, value.dim() - 1]
    return keep is True and len(listed) == 1 and bool(listed[0] in last)


def _constant_added(node: Node, term: Node) -> float | None:
    if call_name(node) != "add" or len(node.args) != 2 or node.kwargs:
        return None
    return _number(node.args[1] if node.args[0] is term else node.args[0])


def _number(value: Any) -> float | None:
    """A constant; one that Dynamo keeps open under dynamic=True is fixed by a guard."""
    if isinstance(value, Node):
        value = value.meta.get("example_value")
    if isinstance(value, int | float | torch.SymFloat) and not isinstance(value, bool):
        return float(value)
    return None
