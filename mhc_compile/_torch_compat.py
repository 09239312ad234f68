"""The only file that imports torch's private names, and what the passes need to know of torch."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, FunctionType
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._library.utils import get_layout_constraint_tag
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

__all__ = [
    "AUTOCAST_DEVICES",
    "CheckpointPolicy",
    "CustomGraphPass",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "Source",
    "StorageWeakRef",
    "TorchDispatchMode",
    "WeakIdKeyDictionary",
    "WeakIdRef",
    "aot_module",
    "autocast_state",
    "below_autograd",
    "compile_with_inductor",
    "compiled_module",
    "default_store",
    "fake_mode_of",
    "force_eager",
    "hash_of_files",
    "inductor_decompositions",
    "inductor_mode_options",
    "inductor_option_names",
    "inductor_setting",
    "introduce_to_inductor",
    "is_internal",
    "log_artifact",
    "is_view_call",
    "no_nested_tensor_fastpath",
    "occupy_gpu",
    "partitioned_forward",
    "pipeline_runtime",
    "saving_hook",
    "size_hint",
    "statically_known_true",
    "tensor_leaves",
    "user_frame",
    "user_source",
]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_NN_MODULES = os.path.join(_TORCH, "nn", "modules") + os.sep
_OWN = (
    os.path.join(os.path.dirname(os.path.abspath(__file__)), "passes") + os.sep,
    os.path.abspath(__file__),
)
Source = tuple[str, int]
# torch.amp.is_autocast_available itself stops torch.compile before torch 2.13.
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
    if torch.amp.is_autocast_available(device)
)


def is_internal(filename: str) -> bool:
    """Layers such as nn.TransformerEncoderLayer are user code; torch's machinery is not."""
    if filename.startswith(_NN_MODULES):
        return filename.endswith(os.sep + "module.py")
    return filename.startswith((_TORCH, *_OWN)) or filename.startswith("<mhc_compile")


def user_frame(depth: int = 1) -> FrameType | None:
    """The innermost Python frame that belongs to neither torch's machinery nor the passes."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and is_internal(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def user_source(depth: int = 2) -> Source | None:
    """File and line of `user_frame`."""
    frame = user_frame(depth)
    return (frame.f_code.co_filename, frame.f_lineno) if frame is not None else None


def below_autograd() -> contextlib.AbstractContextManager[object]:
    """Inside it no views are recorded, so that an operator may return one of what it made.

    What autograd takes for a view made inside a custom operator must not be changed in place.
    """
    guard: contextlib.AbstractContextManager[object] = torch._C._AutoDispatchBelowADInplaceOrView()
    return guard


def autocast_state(device_type: str) -> tuple[bool, torch.dtype] | None:
    """Whether autocast is on for a device type and to what dtype; None where there is none."""
    if device_type not in AUTOCAST_DEVICES:
        return None
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


@contextlib.contextmanager
def no_nested_tensor_fastpath() -> Iterator[None]:
    """nn.TransformerEncoderLayer's fused inference path hides the residual adds of a recording."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def force_eager() -> Iterator[None]:
    """Runs functions decorated with torch.compile uncompiled, so that passes see inside."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled_module(module: torch.nn.Module) -> torch.nn.Module | None:
    """What `torch.compile(module)` wraps, None for other modules.

    The wrapper calls it by a method that was bound before anything could be patched.
    """
    if type(module).__name__ != "OptimizedModule":
        return None
    inner = module._modules.get("_orig_mod")
    return inner


def saving_hook() -> Callable[[torch.Tensor], Any] | None:
    """The innermost hook that autograd gives tensors to keep, None where there is none."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclass objects, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict) or hasattr(value, "items"):
        return [t for v in dict(value.items()).values() for t in tensor_leaves(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensor_leaves(v)]
    if hasattr(type(value), "__dataclass_fields__") and not isinstance(value, torch.nn.Module):
        names = type(value).__dataclass_fields__
        return [t for name in names for t in tensor_leaves(getattr(value, name, None))]
    return []


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings for a `mode=` of torch.compile."""
    from torch._inductor import list_mode_options

    settings: dict[str, Any] = {} if mode == "default" else list_mode_options(mode)
    return settings


def inductor_option_names() -> list[str]:
    """The names of Inductor's settings."""
    from torch._inductor import list_options

    names: list[str] = list_options()
    return names


def inductor_setting(name: str) -> Any:
    """The present value of one of Inductor's settings."""
    from torch._inductor import config

    return getattr(config, name)


def hash_of_files(paths: tuple[str, ...]) -> bytes:
    """A hash of the contents of source files."""
    from torch._inductor.custom_graph_pass import get_hash_for_files

    digest: bytes = get_hash_for_files(paths)
    return digest


def fake_mode_of(tensors: Any) -> contextlib.AbstractContextManager[object]:
    """The mode that fake tensors belong to; a context that does nothing where none is fake."""
    from torch._guards import detect_fake_mode

    mode: contextlib.AbstractContextManager[object] | None = detect_fake_mode(tensors)
    return mode or contextlib.nullcontext()


def introduce_to_inductor(operators: Iterable[OpOverload]) -> None:
    """Tells Inductor, where it is loaded, that these operators stay calls.

    Else it notes so when it first meets one, and up to torch 2.12 this note writes out the
    arguments with all that they were computed from: for the last operator of a chain that takes
    twice as long for each one before it, more than four minutes for eight blocks.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None:
        return
    for operator in operators:
        if operator not in lowering.lowerings:
            tag = get_layout_constraint_tag(operator, with_default=True)
            constraint = lowering.tag_to_layout_constraint(tag)
            lowering.make_fallback(operator, constraint, warn=False, override_decomp=True)


def compile_with_inductor(gm: Any, inputs: Any, settings: dict[str, Any]) -> Any:
    """Runs Inductor on a graph of torch calls, AOTAutograd included."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, inputs, config_patches=settings)


def occupy_gpu(cycles: int) -> None:
    """Lets the GPU wait, so that what is launched meanwhile runs without gaps."""
    torch.cuda._sleep(cycles)


def boxed(graph_module: Any) -> Any:
    """A function that runs a graph call by call; a tensor it is given is freed after its last use.

    It takes its arguments as one list, which it empties.
    """
    from torch.fx.graph import _BoxedCodeGen

    graph_module.graph.set_codegen(_BoxedCodeGen())
    graph_module.recompile()

    def call(args: Any) -> Any:
        return graph_module.forward(args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def compile_piece(graph_module: Any, settings: dict[str, Any]) -> Any:
    """Inductor's function for a part of a forward or backward graph; its first call compiles."""
    _ = graph_module.code  # else it is written late, under Dynamo, which refuses such modules

    def piece(*args: Any) -> Any:
        return graph_module(*args)

    # With code of its own, for Dynamo counts the recompilations of a code object.
    own = FunctionType(piece.__code__.replace(), globals(), closure=piece.__closure__)
    return torch.no_grad()(torch.compile(own, fullgraph=True, options=settings or None))


def aot_module(
    gm: Any, inputs: Any, before_partition: Any, change: Any, finish: Any = boxed
) -> Any:
    """Runs AOTAutograd on a graph.

    `before_partition` changes the joint graph, `change` the forward and the backward graph, and
    `finish` makes functions of these.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: Any, *args: Any, **kwargs: Any) -> Any:
        before_partition(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    def run(graph_module: Any, _: Any) -> Any:
        change(graph_module.graph)
        return finish(graph_module)

    return aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=partition)(gm, inputs)


def partitioned_forward(joint: Any, results: int) -> Any:
    """The forward graph that AOTAutograd's partitioner would make of a joint graph, which stays.

    `results` says how many of the joint graph's are the forward's.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    copy = torch.fx.Graph()
    ends, output = copy.graph_copy(joint, {}, return_output_node=True)  # type: ignore[misc]
    copy.output(ends).meta = dict(output.meta)  # type: ignore[union-attr]
    module = torch.fx.GraphModule(joint.owning_module, copy)
    forward, _ = min_cut_rematerialization_partition(module, None, num_fwd_outputs=results)
    return forward.graph


def is_view_call(node: Any) -> bool:
    """Whether a node of an ATen graph only looks at its argument's memory in another way."""
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    return target.is_view or target in (
        torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default
    )  # fmt: skip


def log_artifact(name: str, text: Callable[[], str]) -> None:
    """Adds a text to the trace that TORCH_TRACE writes."""
    from torch._logging import trace_structured

    trace_structured("artifact", lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def inductor_decompositions() -> Any:
    """The operators that Inductor wants written out as others."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def statically_known_true(condition: Any) -> bool:
    """Whether a condition on sizes holds for all of them; asks nothing of the sizes at hand."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true as known

    return known(condition)


def size_hint(size: Any) -> int:
    """The size at hand of one that may be symbolic, without fixing it."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 2**31


def ddp_cuts_graphs() -> bool:
    """Whether Dynamo compiles within DistributedDataParallel, and cuts graphs at its buckets."""
    if not torch.distributed.is_available():
        return False
    from torch._dynamo.utils import get_optimize_ddp_mode
    from torch.nn.parallel import DistributedDataParallel

    module: Any = DistributedDataParallel._get_active_ddp_module()
    if module is None or get_optimize_ddp_mode() != "ddp_optimizer":
        return False
    return sum(p.nbytes for p in module.parameters() if p.requires_grad) > module.bucket_bytes_cap


def pipeline_runtime() -> tuple[Any, tuple[Any, ...]]:
    """The class that walks through a pipeline's actions, and the kinds of those that compute."""
    from torch.distributed.pipelining.schedules import (
        BACKWARD_INPUT,
        BACKWARD_WEIGHT,
        FORWARD,
        FULL_BACKWARD,
        OVERLAP_F_B,
        _PipelineScheduleRuntime,
    )

    kinds = (FORWARD, FULL_BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, OVERLAP_F_B)
    return _PipelineScheduleRuntime, kinds


def default_store() -> Any:
    """The key-value store by which the processes of torch.distributed met, None without them."""
    from torch.distributed import distributed_c10d, is_initialized

    return distributed_c10d._get_default_store() if is_initialized() else None
