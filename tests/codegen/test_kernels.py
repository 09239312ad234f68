"""Every operator by generated kernels against float64, forward and backward.

On a GPU with TRITON_INTERPRET=0 (`make test-gpu`), else in Triton's interpreter on the CPU.
`bound_of` in operators.py states the tolerances and why.
"""

import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from operators import (
    EPS,
    NORMS,
    OPERATORS,
    RULES,
    Case,
    bound_of,
    check,
    cotangents,
    error,
    gradients,
    inputs_of,
    names_of,
    run,
)  # fmt: skip

import mhc_compile as mc
from mhc_compile.codegen import interpreter, launch, signature
from mhc_compile.codegen import kernel_calls as module
from mhc_compile.codegen.kernel_calls import KernelCalls, kernel_calls
from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.traffic import count_traffic
from mhc_compile.codegen.tuning import tuning_of
from mhc_compile.runtime import fused, ops

BF16, F16, F32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHANNELS, TOKENS = (33, 1000, 4099), (0, 1, 3, 64, 130)
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encounter")


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The device of the kernels; on the CPU the operators run them instead of torch."""
    if not interpreter.interpreting():
        if not torch.cuda.is_available():
            pytest.skip("no GPU, and TRITON_INTERPRET is off")
        yield torch.device("cuda")
        return
    interpreter.mend()
    monkeypatch.setattr(ops, "fused", launch)
    yield torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned(device):
    """Memory is full of NaN until a kernel has written it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_memory_is_poisoned(device):
    call = KernelCalls(torch.Size((2, 4, 8)), torch.float32, torch.device(device))
    assert call.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3, dtype=BF16, device=device)).isnan().all()


def fits(case):
    """Whether the interpreter takes no more than some ten seconds for it."""
    return case.tokens * case.channels <= 13_000 or (case.n <= 4 and case.tokens <= 3)


# Axes that are spread over the cases, not multiplied with the others.
RULE, NORM, DTYPE, STREAMS, APART = map(
    itertools.cycle, (RULES, NORMS, DTYPES, (4, 1, 3, 8, 2, 5), (True, False, False, True, True))
)
CASES = [
    # each convention, with and without padding of its matrices
    *(Case("coefficients", n, dtype=next(DTYPE), rule=rule)
      for rule, n in zip(RULES, itertools.cycle((4, 8, 2)))),
    *(Case("read", n, dtype=next(DTYPE), rule=rule)
      for rule, n in zip(RULES, itertools.cycle((3, 5, 7, 6)))),
    # each number of streams and dtype
    *(Case("seam", n, dtype=dtype, norm=next(NORM), rule=next(RULE), apart=next(APART))
      for dtype in DTYPES for n in range(1, 9)),
    # each size
    Case("seam", 4, 1000, 3, BF16, norm="rms"), Case("seam", 2, 1000, 1, F32, norm="layer"),
    Case("seam", 1, 4099, 3, F16, norm="rms plain"),
    Case("seam", 2, 1000, 3, BF16, norm="layer", apart=True),
    Case("seam", 1, 4099, 1, BF16, norm="rms", apart=True),
    Case("seam", 7, 520, 1, BF16, norm="rms"),  # turns of the loops over channels
    *(Case("seam", 1, tokens=tokens, dtype=next(DTYPE), norm="rms") for tokens in (0, 64, 130)),
    *(Case(op, 2, 33, tokens, next(DTYPE)) for op in OPERATORS[:4] for tokens in (0, 70)),
    *(Case(op, next(STREAMS), channels, tokens, next(DTYPE))
      for op in ("pre", "post_res", "expand", "collapse")
      for channels, tokens in ((33, 17), (1000, 3), (4099, 1))),
    Case("coefficients", 3, 1000, 1, F32), Case("read", 1, 4099, 1, F16),
]  # fmt: skip
EVERYTHING = [
    *(Case(op, n, channels, tokens, dtype, next(RULE), next(NORM) if op == "seam" else "none",
           apart=next(APART))
      for op, n, channels, tokens, dtype
      in itertools.product(OPERATORS, range(1, 9), CHANNELS, TOKENS, DTYPES)),
    *(Case(op, n, tokens=5, dtype=dtype, rule=rule)
      for op, n, dtype, rule
      in itertools.product(("coefficients", "seam"), range(1, 9), DTYPES, RULES)),
    *(Case("seam", n, tokens=9, dtype=dtype, norm=norm, apart=apart)
      for n, dtype, norm, apart in itertools.product(range(1, 9), DTYPES, NORMS, (True, False))),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case, device):
    check(case, inputs_of(case, device))


@pytest.mark.long
@pytest.mark.parametrize("case", EVERYTHING, ids=str)
def test_everything(case, device):
    if device.type == "cpu" and not fits(case):
        pytest.skip("takes too long in the interpreter")
    check(case, inputs_of(case, device))


def run_both_ways(case, device):
    p = inputs_of(case, device)
    out = run(case, p)
    return out, gradients(out, p, cotangents(case, out))


SMALL = [
    Case(op, n, 40, 5, dtype, norm="rms" if op == "seam" else "none", apart=apart)
    for op, apart in (
        ("coefficients", False),
        ("pre", False),
        ("read", False),
        ("post_res", False),
        ("seam", True),
        ("seam", False),
    )
    for n, dtype in ((4, BF16), (5, F32))
    if n <= 4 or op != "seam" or apart
]
"""A launch of every kernel, for compute-sanitizer: see docs/kernels.md."""


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case, device):
    check(case, inputs_of(case, device))


def test_small_launches_every_kernel(device, monkeypatch):
    seen, launched = set(), KernelCalls.run

    def noted(call, spec, *args, **options):
        seen.add((spec.op, spec.mix, spec.carry, spec.norm))
        return launched(call, spec, *args, **options)

    monkeypatch.setattr(KernelCalls, "run", noted)
    for case in SMALL:
        run_both_ways(case, device)
        if case.op == "seam":
            seam_backward_with_h(case, device)
    specs = [spec for n in (4, 5) for spec in kernel_set(n, 40)]
    wanted = {(spec.op, spec.mix, spec.carry) for spec in specs}
    assert wanted <= {key[:3] for key in seen}
    assert {("read", "rms"), ("read", "none")} <= {(key[0], key[3]) for key in seen}


def seam_backward_with_h(case, device, *without):
    """The operator's results without h and with it, its arguments, and the seam's own h."""
    p = {name: value.detach() for name, value in inputs_of(case, device).items()}
    out = run(case, p)
    proj, square = torch.ops.mhc.coefficients(out[0], p["phi"], p["alpha"], p["bias"], case.key)[3:]
    gradients = dict(zip(("y", "h", "pre", "post", "res"), cotangents(case, out), strict=True))
    gradients |= dict.fromkeys(without)
    streams, projection = list(p.values())[:4], list(p.values())[4:7]
    args = [*gradients.values(), *streams, out[0], *projection, p.get("norm weight"),
            p.get("norm shift"), out[2], proj, square, case.norm.split()[0], EPS, case.key,
            True]  # fmt: skip
    both = [torch.ops.mhc.seam_backward(*args, need_h) for need_h in (False, True)]
    return *both, args, out[1]


AGAIN = [
    Case("seam", n, channels, tokens, dtype, norm=norm, apart=True)
    for (n, channels, tokens, dtype), norm in itertools.product(
        ((4, 33, 3, BF16), (3, 40, 7, F32), (2, 1000, 2, F16), (1, 64, 5, BF16), (5, 33, 3, BF16),
         (4, 40, 0, BF16)), NORMS,
    )
]  # fmt: skip


@pytest.mark.parametrize("case", AGAIN, ids=str)
def test_a_backward_makes_h_again(case, device):
    (*plain, none), (*rest, h), args, of_the_seam = seam_backward_with_h(case, device)
    assert none.shape == (0,) and h.shape == of_the_seam.shape and h.dtype == case.dtype
    assert error(h, of_the_seam) <= 2 * torch.finfo(case.dtype).eps  # sums in another order
    assert all(torch.equal(a, b) for a, b in zip(plain, rest, strict=True))
    right = fused.seam_backward(*[a.double() if isinstance(a, torch.Tensor) else a for a in args],
                                True)[-1]  # fmt: skip
    assert error(h, right) <= bound_of(case, "h", False)


def test_a_backward_makes_h_that_has_no_gradient(device):
    _, (*_, h), _, of_the_seam = seam_backward_with_h(
        Case("seam", 4, 33, 3, BF16, norm="rms", apart=True), device, "h"
    )
    assert error(h, of_the_seam) <= torch.finfo(BF16).eps


def test_joined_parts_give_what_parts_give(device, monkeypatch):
    """Six parts of three tiles, joined by two: nine units of work for two programs."""
    case = Case("seam", 3, 700, 40, BF16, norm="rms", apart=True)
    p, choose, joined = inputs_of(case, device), module.tile_for, []
    monkeypatch.setattr(signature, "multiprocessors", lambda: 1)

    def tile_for(spec, *rest):
        tile = choose(spec, *rest)
        if spec.op != "seam_backward":
            return tile
        joined.append(tile.parts)
        return replace(tile, joined=2)

    module.kernel_calls.cache_clear()
    given = cotangents(case, run(case, p))
    apart = gradients(run(case, p), p, given)
    monkeypatch.setattr(module, "tile_for", tile_for)
    module.kernel_calls.cache_clear()
    together = gradients(run(case, p), p, given)
    module.kernel_calls.cache_clear()
    assert joined == [6]
    assert all(error(together[name], apart[name]) <= 1e-6 for name in p)


EQUAL_STREAMS = [
    Case(op, n, channels, 5, dtype, norm=norm if op == "seam" else "none", apart=True)
    for op in OPERATORS[:5]
    for n, channels, dtype, norm in (
        (4, 520, BF16, "rms"), (3, 33, F16, "layer"), (2, 40, F32, "none"), (8, 72, BF16, "layer"),
        (5, 33, F32, "rms"), (1, 40, BF16, "rms"),
    )
]  # fmt: skip


@pytest.mark.parametrize("case", EQUAL_STREAMS, ids=str)
def test_equal_streams_are_read_once(case, device, monkeypatch):
    """Where a stream starts: views of stride 0 give, bit by bit, what copies of them give."""
    p = inputs_of(case, device)
    once = p["x"][:, :1].detach().clone()
    alike, launched, equal = once.expand_as(p["x"]), KernelCalls.run, set()

    def noted(call, spec, *args, **options):
        equal.add((spec.op, spec.mix) if spec.equal else None)
        return launched(call, spec, *args, **options)

    monkeypatch.setattr(KernelCalls, "run", noted)
    found = []
    for x in (alike.contiguous(), alike):
        values = p | {"x": x.detach().requires_grad_()}
        out = run(case, values)
        torch.manual_seed(0)
        found.append((*out, *gradients(out, values, cotangents(case, out)).values()))
        if x.is_contiguous():
            assert equal == {None}
    exact = device.type == "cpu"  # another compiler may add up in another order
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) if exact else error(a, b) <= 2 * torch.finfo(case.dtype).eps
    with_x = {
        "coefficients": {("project", False), ("phi_backward", False), ("read_backward", False)},
        "read": {("read", False), ("pre_backward", False), ("read_backward", False)},
        "pre": {("pre", False), ("pre_backward", False)},
        "post_res": {("mix", False), ("mix_backward", False)},
        "seam": {("project", True), ("seam_backward", False)} if case.n <= 4
        else {("mix", False), ("mix_backward", False)},
    }[case.op]  # fmt: skip
    assert with_x <= equal if case.n > 1 else equal == {None}
    check(case, p | {"x": alike.detach().requires_grad_()})


@pytest.mark.parametrize("norm", ("rms", "layer weight"))
def test_a_norm_whose_weight_has_another_dtype(norm, device):
    """A model in float32 under autocast, or a norm that is kept in float32."""
    case = Case("seam", 4, 72, 21, BF16, norm=norm, apart=True)
    p = inputs_of(case, device)
    wide = p | {"norm weight": p["norm weight"].detach().float().requires_grad_()}
    results = [run(case, values) for values in (p, wide)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    given = cotangents(case, results[0])
    narrow, full = (gradients(out, values, given)
                    for out, values in zip(results, (p, wide), strict=True))  # fmt: skip
    assert full["norm weight"].dtype == torch.float32
    assert all(error(full[name].to(narrow[name].dtype), narrow[name]) <= 1e-6 for name in narrow)


def test_a_launch_finds_the_kernel_of_the_one_before(monkeypatch):
    """Unless Triton would compile another: for other dtypes, alignment, numbers, programs."""
    searched, launched = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: launched.append((grid, args))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: searched.append(grid) or Compiled()

    monkeypatch.setattr(module, "load", lambda spec: Kernel())
    call = KernelCalls(torch.Size((9, 4, 64)), BF16, torch.device("cpu"))
    cuda = replace(call.spec("mix"), target="cuda")
    room = torch.zeros(65)
    values = [room[:64], None, 3, 1e-6]
    call.run(cuda, *values)
    call.run(cuda, torch.zeros(64), None, 3, 1e-5)
    assert len(searched) == 1 and launched[0][0] == (*searched[0], 1, 1)
    others = [[room[1:], None, 3, 1e-6], [room[:64].to(BF16), None, 3, 1e-6],
              [room[:64], None, 4, 1e-6], [room[:64], room[:64], 3, 1e-6]]  # fmt: skip
    for count, other in enumerate(others, 2):
        call.run(cuda, *other)
        assert len(searched) == count
    call.run(cuda, *values, programs=7)
    assert searched[-1] == (7,) and len(searched) == 6
    for target in ("interpret", "hip"):
        for _ in range(2):
            call.run(replace(cuda, target=target), *values)
    assert len(searched) == 10 and len(launched) == 1


def test_calls_of_one_size_are_kept():
    size = torch.Size((9, 4, 64)), BF16, torch.device("cpu")
    usual = tuning_of(size[2])
    first = kernel_calls(*size, None, usual)
    assert kernel_calls(*size, None, usual) is first
    for other in ((*size, None, usual._replace(generation=7)), (*size, Case("read").key, usual)):
        assert kernel_calls(*other) is not first


def test_specs_are_found_in_other_processes():
    spec = kernel_set(4, 40)[0]
    assert hash(spec) == hash(replace(spec)) and replace(spec) == spec
    assert "_hash" in vars(spec) and "_hash" not in vars(pickle.loads(pickle.dumps(spec)))


class Unshared:
    """The launches; results of one that share memory with each other or with inputs are noted."""

    def __init__(self, faults):
        self.faults, self.supports = faults, launch.supports

    def __getattr__(self, name):
        def call(*args):
            out = getattr(launch, name)(*args)
            results = out if isinstance(out, tuple) else (out,)
            given, made = (
                [t.untyped_storage().data_ptr() for t in side if torch.is_tensor(t) and t.numel()]
                for side in (args, results)
            )
            self.faults += [name] * (len({*made} - {*given}) < len(made))
            return out

        return call


def test_results_share_no_memory(device, monkeypatch):
    """Torch refuses operators whose results do, after a warning through torch 2.13."""
    faults = []
    monkeypatch.setattr(ops, "fused", Unshared(faults))
    monkeypatch.setattr(ops, "_kernels", lambda: Unshared(faults))
    for case in SMALL:
        run_both_ways(case, device)
    assert not faults


def test_no_access_outside_of_the_arguments(device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("counted in the interpreter; on a GPU by compute-sanitizer")
    launched = KernelCalls.run

    def counted(call, spec, *args, **options):
        with count_traffic({str(k): a for k, a in enumerate(args) if torch.is_tensor(a)}):
            return launched(call, spec, *args, **options)

    monkeypatch.setattr(KernelCalls, "run", counted)
    for n, dtype in ((3, BF16), (5, F16)):
        run_both_ways(Case("seam", n, 33, 2, dtype, norm="layer"), device)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "stream last"])
@pytest.mark.parametrize("op", ["seam", "read", "post_res", "pre"])
def test_strided_inputs(op, layout, device):
    case = Case(op, 4, 20, 6, F32 if layout == "sliced" else BF16)
    p = inputs_of(case, device)
    wide = torch.randn(6, 4, 20, device=device).to(case.dtype)
    p["x"] = {
        "transposed": lambda: wide.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": lambda: wide[:, :1].expand(6, 4, 20),
        "sliced": lambda: torch.stack([wide, wide], -1).repeat(2, 1, 1, 1)[::2, ..., 1],
        "stream last": lambda: wide.mT.contiguous().mT,
    }[layout]().detach().requires_grad_()  # fmt: skip
    assert not p["x"].is_contiguous()
    for name in ("f", "post", "phi"):
        if name in p:
            p[name] = p[name].detach().t().contiguous().t().requires_grad_()
            assert not p[name].is_contiguous()
    check(case, p)


def test_leading_dimensions_and_strided_gradients(device):
    case = Case("seam", 3, 20, 6, BF16, norm="rms")
    p = inputs_of(case, device)
    flat = run(case, p)
    lead = {
        n: t.unflatten(0, (2, 3)) if n in ("x", "f", "post", "res") else t for n, t in p.items()
    }
    got = run(case, lead)
    for a, b in zip(got, flat, strict=True):
        assert a.shape[:2] == (2, 3) and torch.equal(a.flatten(0, 1), b)
    sums = torch.autograd.grad(sum(t.float().sum() for t in got), list(p.values()))  # expanded
    right = torch.autograd.grad(flat, list(p.values()), [torch.ones_like(t) for t in flat])
    for a, b in zip(sums, right, strict=True):
        assert torch.equal(a, b)


USED = [("y",), ("h",), ("y", "h"), ("pre",), ("post", "res"), ("h", "pre")]


@pytest.mark.parametrize(
    "n, dtype, used",
    [(3, BF16, used) for used in USED] + [(5, F32, used) for used in (("y",), ("h", "pre"))],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_missing_gradients(n, dtype, used, device):
    seam = Case("seam", n, dtype=dtype, norm="layer", apart="y" in used)
    check(seam, inputs_of(seam, device), used)
    read = Case("read", n, dtype=dtype)
    if used != ("y",):
        check(read, inputs_of(read, device), used)


@pytest.mark.parametrize("op", ["seam", "read"])
@pytest.mark.parametrize("frozen", ["phi", "x", "all but x"])
def test_frozen_inputs(frozen, op, device, monkeypatch):
    case = Case(op, 3, dtype=F32)
    p = inputs_of(case, device)
    for name, value in p.items():
        if name == frozen or (frozen == "all but x" and name != "x"):
            value.requires_grad_(False)
    launched, names = KernelCalls.run, []

    def noted(call, spec, *args, **options):
        names.append(spec.op)
        return launched(call, spec, *args, **options)

    monkeypatch.setattr(KernelCalls, "run", noted)
    check(case, p)
    assert ("phi_backward" in names) == (frozen == "x")


@pytest.mark.parametrize("parameters", [BF16, torch.float64], ids=str)
@pytest.mark.parametrize("op", ["seam", "read"])
def test_parameters_in_another_dtype(op, parameters, device):
    case = Case(op, 4, 40, 5, BF16, parameters=parameters, apart=parameters == BF16)
    check(case, inputs_of(case, device))


def test_sublayer_in_another_dtype(device):
    case = Case("post_res", 3, dtype=F32)
    p = inputs_of(case, device)
    p["f"] = p["f"].detach().to(BF16).requires_grad_()
    check(case, p)


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("rule", ["paper", "deepseek_v4", "transformer_engine", "clamp"])
def test_extreme_logits(rule, n, device):
    """With biases of +-200 most gates are closed; what stays must be finite, and right."""
    case = Case("read", n, 20, 9, F32, rule)
    p = inputs_of(case, device)
    with torch.no_grad():
        p["bias"].copy_(200 * torch.randint(-1, 2, p["bias"].shape))
    # Sinkhorn's slopes reach thousands: the differences of such numbers keep fewer digits.
    check(case, p, bounds=lambda *about: 100 * bound_of(*about))


def test_nan_stays_in_its_token(device):
    for case in (Case("seam", 2, 33, 12, BF16, norm="rms"), Case("read", 3, 33, 12, F32)):
        p = inputs_of(case, device)
        clean = run(case, p)
        given = cotangents(case, clean)
        right = gradients(clean, p, given)
        p["x"].data[7, 1, 3] = float("nan")
        dirty = run(case, p)
        back = gradients(dirty, p, given)
        others = torch.arange(12, device=device) != 7
        for a, b in zip(dirty, clean, strict=True):
            assert torch.equal(a[others], b[others])
            assert a[7].isnan().any()
        for name in p.keys() & {"x", "f", "post", "res"}:
            assert torch.equal(back[name][others], right[name][others]), name
            assert back[name][7].isnan().any()


def test_equal_runs_give_equal_bits(device):
    """No sum depends on the order in which programs finish."""
    case = Case("seam", 2, 200, 600 if device.type == "cuda" else 12, BF16, norm="rms")
    p = inputs_of(case, device)
    given = cotangents(case, run(case, p))
    first, *more = [gradients(run(case, p), p, given) for _ in range(2)]
    for other in more:
        assert all(torch.equal(first[name], other[name]) for name in p)


def test_more_tokens_than_a_group(device, monkeypatch):
    """Phi's gradient in shares of several groups, and pre's norm by programs of several tokens."""
    if device.type == "cpu":
        monkeypatch.setattr(signature, "_GROUP_TOKENS", 8)
        monkeypatch.setattr(signature, "multiprocessors", lambda: 1)
    case = Case("seam", 2, 20, 20 if device.type == "cpu" else 5000, BF16, norm="layer")
    check(case, inputs_of(case, device))


@pytest.mark.parametrize(("n", "dtype"), [(3, BF16), (8, F16), (9, F32)])
def test_the_gradient_of_a_collapse_with_fixed_weights(n, dtype, device):
    """Autograd keeps no streams for it; more of them than the kernels take are torch's."""
    g = torch.randn(2, 5, 33, device=device).to(dtype)
    weight = torch.randn(n, device=device)
    g_x, g_weight = launch.collapse_backward(g, None, weight)
    right = weight.double()[:, None] * g.double()[..., None, :]
    torch.testing.assert_close(g_x, right.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    assert g_weight.numel() == 0


def test_results_lie_as_promised(device):
    """Streams are contiguous whatever the input's strides; gradients have their value's dtype."""
    x = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    assert launch.expand(x, 2).is_contiguous() and launch.expand(x, 1).is_contiguous()
    torch.testing.assert_close(launch.expand(x, 2), x.unsqueeze(-2).expand(2, 3, 4, 2, 5))
    p = inputs_of(Case("pre", 2, 40, 3, BF16), device)
    g_x, _ = launch.pre_backward(torch.randn(3, 40, device=device), p["x"], p["pre"])
    assert g_x.dtype == BF16


def test_wrong_streams_are_refused(device):
    p = inputs_of(Case("pre", 9, 8), device)
    with pytest.raises(mc.MHCError, match="up to 8 streams, got 9"):
        launch.pre(*p.values())
    seam = Case("seam", 2, 8)
    p = inputs_of(seam, device)
    with pytest.raises(mc.MHCError, match="norm must be one of"):
        torch.ops.mhc.seam(*p.values(), None, None, "batch", 1e-3, seam.key)


@pytest.mark.parametrize("name", names_of(Case("seam")))
def test_a_wrong_result_is_seen(name, device):
    """The measure itself: one element of a tensor that is off by more than its rounding."""
    case = Case("seam", 2, dtype=F32)
    out = dict(zip(names_of(case), run(case, inputs_of(case, device)), strict=True))[name].detach()
    wrong = out.clone(memory_format=torch.contiguous_format)
    wrong.view(-1)[-1] += 1e-3 * out.abs().max()
    assert error(wrong, out) > bound_of(case, name, False) > error(out, out)
    wrong.view(-1)[-1] = float("nan")
    assert error(wrong, out) == float("inf")
