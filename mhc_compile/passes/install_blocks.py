"""Step 8, install: a block runs the Python generated from its rewritten graph.

The generated function takes the block as `self` and looks its submodules up at every call, so
that hooks, deepcopy, `.to()`, adapters on submodules and gradient checkpointing go on working.
"""

from __future__ import annotations

import hashlib
import inspect
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn

from mhc_compile._torch_compat import tensor_leaves
from mhc_compile.config import MHCConfig
from mhc_compile.errors import AlreadyTransformedError, MHCError, UnsupportedResidualError
from mhc_compile.passes.add_guards import add_guards
from mhc_compile.passes.block_calls import (
    attention_modules,
    call_key,
    device_of,
    leaf_order,
    many_streams,
    mode_key,
    one_stream,
    replace_streams,
)
from mhc_compile.passes.call_paths import argument_at, positional_names
from mhc_compile.passes.graph_sites import collapse_name
from mhc_compile.passes.open_arguments import find_open_arguments
from mhc_compile.passes.plan import BlockPlan
from mhc_compile.passes.rewrite_block import rewrite_block
from mhc_compile.passes.trace_block import TracedBlock, trace_block, warn_of_notes
from mhc_compile.passes.trace_inputs import Write, finish_result
from mhc_compile.runtime.guards import GuardMismatch
from mhc_compile.runtime.modes import enter_autocast, left_on_error, set_grad_mode
from mhc_compile.runtime.modules import MARK, HyperConnection, StreamCollapse

ATTRIBUTE = "mhc"
MAX_VARIANTS = 16
_REWRITE = "_mhc_rewrite"


@dataclass
class Variant:
    """One traced way through a block's forward: its Python source and the function made of it."""

    source: str
    function: Callable[..., Any]
    order: tuple[int, ...]
    writes: tuple[Write, ...] = ()
    kind: type | None = None
    modes: bool = False


@dataclass
class BlockRewrite:
    """What a rewritten block keeps besides its modules; `ran` is for `surroundings`.

    `attentions` are the submodules whose configuration names an implementation of attention.
    """

    plan: BlockPlan
    config: MHCConfig
    original: type[nn.Module]
    open_names: frozenset[str] = frozenset()
    attentions: tuple[str, ...] = ()
    variants: dict[Any, list[Variant]] = field(default_factory=dict)
    ran: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """What pickle keeps: functions are made anew, from the code that a process runs."""
        return {**self.__dict__, "variants": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockRewrite:
        """A copy that learns new kinds of calls by itself; what it shares is immutable."""
        variants = {key: list(known) for key, known in self.variants.items()}
        return replace(self, variants=variants)

    def key(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: list[Any]
    ) -> Any:
        """Describes a kind of call, hashable; fills `leaves` with what may vary within it."""

        def part(name: str | None, value: Any) -> Any:
            if name in self.open_names:
                leaves.append(value)
                return None
            return call_key(value, leaves)

        names = (*positional_names(self.original.forward), *[None] * len(args))
        by_position = tuple([part(n, a) for n, a in zip(names, args, strict=False)])
        by_name = tuple([(k, part(k, v)) for k, v in kwargs.items()])
        return mode_key(block, self.plan, self.attentions), by_position, by_name

    def call(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Runs the variant that fits the arguments; an unseen kind of call is traced first."""
        leaves: list[Any] = []
        key = self.key(block, args, kwargs, leaves)
        for variant in self.variants.get(key, ()):
            try:
                return self.run(variant, block, args, kwargs, leaves)
            except GuardMismatch:
                continue
        variant = trace_variant(block, self, key, args, kwargs)
        return self.run(variant, block, args, kwargs, leaves)

    def run(
        self,
        variant: Variant,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        leaves: list[Any],
    ) -> Any:
        """Calls the generated function and marks the streams that it hands on."""
        if not torch.compiler.is_compiling():
            self.ran = True
        inputs = [leaves[i] for i in variant.order]
        if variant.modes and not torch.compiler.is_compiling():
            with left_on_error():
                result = variant.function(block, *inputs)
        else:
            result = variant.function(block, *inputs)
        if variant.writes or variant.kind is not None:
            forward = self.original.forward
            find = partial(argument_at, forward, args, kwargs)
            result = finish_result(variant.writes, variant.kind, find, result)
        if self.config.streams > 1:
            for segment in self.plan.segments:
                for k in segment.outputs:
                    setattr(tensor_leaves(result)[k], MARK, True)
        return result


@torch.compiler.disable(
    reason="mhc_compile traces a block when a kind of call is new (another mode, dtype, mask or "
    "cache): make one such call without torch.compile first"
)
def trace_variant(
    block: nn.Module,
    rewrite: BlockRewrite,
    key: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Variant:
    """Traces and rewrites a block for one kind of call and keeps the result."""
    known = rewrite.variants.setdefault(key, [])
    if len(known) >= MAX_VARIANTS:
        raise MHCError(
            f"block {rewrite.plan.name!r} was traced {MAX_VARIANTS} times for the same kind of "
            "call: its Python depends on a size or number that keeps changing; move that code into "
            "a submodule"
        )
    plain_args, plain_kwargs = replace_streams(rewrite, args, kwargs, one_stream)
    forward, label = rewrite.original.forward, rewrite.original.__name__
    traced = trace_block(
        block, forward, plain_args, plain_kwargs, rewrite.plan.opened, label, rewrite.open_names,
        frozenset(s for s in rewrite.plan.sources if s is not None),
    )  # fmt: skip
    warn_of_notes(rewrite.plan.name, traced)
    add_guards(traced)
    graph = rewrite_block(block, rewrite.plan, rewrite.config, traced, label)
    order = leaf_order(forward, args, kwargs, rewrite.open_names)
    variant = _generate(rewrite, graph, order, traced)
    known.append(variant)
    return variant


def prepare_block(
    block: nn.Module,
    plan: BlockPlan,
    config: MHCConfig,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> BlockRewrite:
    """Traces and rewrites a block for example arguments, in evaluation and in training mode.

    Nothing is installed: the block is as before when this returns or raises.
    """
    if hasattr(block, ATTRIBUTE):
        raise UnsupportedResidualError(
            f"block {plan.name!r} ({type(block).__name__}) already has an attribute "
            f"{ATTRIBUTE!r}, which mhc_compile needs for its parameters; rename it"
        )
    if "forward" in block.__dict__:
        raise UnsupportedResidualError(
            f"block {plan.name!r} ({type(block).__name__}) has a forward of its own on the "
            "instance, as accelerate's hooks put there, which would hide the rewritten one; remove "
            "it first and put it back afterwards"
        )
    rewrite = BlockRewrite(plan, config, type(block), attentions=attention_modules(block))
    # The block's own class would wrap its forward in checkpointing; a subclass's does not count.
    original, modes = type(block), [(m, m.training) for m in block.modules()]
    example = replace_streams(rewrite, args, kwargs, many_streams)
    block.__class__ = _rewritten_class(original)
    try:
        forward = rewrite.original.forward
        rewrite.open_names = find_open_arguments(block, forward, args, kwargs, plan.opened)
        for training in (True, False):
            block.train(training)
            trace_variant(block, rewrite, rewrite.key(block, *example, []), *example)
    finally:
        block.__class__ = original
        for module, mode in modes:
            module.training = mode
    return rewrite


def install_block(block: nn.Module, rewrite: BlockRewrite) -> None:
    """Adds the connections to a block and makes it run its generated forward."""
    plan, config = rewrite.plan, rewrite.config
    device = device_of(block)
    parts: dict[str, nn.Module] = {}
    if config.streams > 1:
        for position, (number, k) in enumerate(plan.order):
            segment = plan.segments[number]
            parts[str(position)] = HyperConnection(
                segment.sites[k].channels, config, index=segment.first_index + k, device=device
            )
        for number, segment in enumerate(plan.segments):
            if segment.collapse:
                parts[collapse_name(plan, number)] = StreamCollapse(
                    config, segment.sites[-1].channels, device=device
                )
    block.add_module(ATTRIBUTE, nn.ModuleDict(parts))
    block.__dict__[_REWRITE] = rewrite
    block.__class__ = _rewritten_class(rewrite.original)


def uninstall_block(block: nn.Module) -> None:
    """Undoes `install_block`; the connections' parameters are gone."""
    rewrite = rewrite_of(block)
    if rewrite is not None:
        block.__class__ = rewrite.original
        del block.__dict__[_REWRITE]
        delattr(block, ATTRIBUTE)


def rewrite_of(module: nn.Module) -> BlockRewrite | None:
    """What was installed on a block, None for other modules."""
    found = module.__dict__.get(_REWRITE)
    return found if isinstance(found, BlockRewrite) else None


def rewritten_blocks(model: nn.Module) -> dict[str, tuple[nn.Module, BlockRewrite]]:
    """The rewritten blocks of a model by name, in the order of their streams."""
    found = {name: (m, r) for name, m in model.named_modules() if (r := rewrite_of(m)) is not None}
    return dict(sorted(found.items(), key=lambda item: _stream_position(item[1][1])))


def refuse_transformed(model: nn.Module) -> None:
    """Raises `AlreadyTransformedError` for a model that has hyper-connections."""
    for name, module in model.named_modules():
        if rewrite_of(module) is not None or isinstance(module, HyperConnection):
            raise AlreadyTransformedError(
                f"{type(model).__name__} has hyper-connections already, in {name!r}; call "
                "mhc_compile.revert(model) first to start again"
            )


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _rewritten_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a block's class, so that isinstance and class-level wrappers go on working."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rewrite: BlockRewrite = self.__dict__[_REWRITE]
        return rewrite.call(self, args, kwargs)

    if original not in _classes:
        # Of the same name: other libraries pick blocks by it (FSDP's wrapping, device maps).
        body = {
            "forward": forward, "__module__": original.__module__, "__doc__": original.__doc__,
            "__qualname__": original.__qualname__, "__reduce_ex__": _reduce_block,
        }  # fmt: skip
        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        _classes[original] = type(original.__name__, (original,), body)
    return _classes[original]


def _reduce_block(block: nn.Module, protocol: int) -> tuple[Any, ...]:
    """For copy and pickle: a rewritten class is found through the user's, which has a place."""
    rewrite: BlockRewrite = block.__dict__[_REWRITE]
    return _empty_block, (rewrite.original,), block.__getstate__()


def _empty_block(original: type[nn.Module]) -> nn.Module:
    cls = _rewritten_class(original)
    return cls.__new__(cls)


def _generate(
    rewrite: BlockRewrite, graph: fx.Graph, order: tuple[int, ...], traced: TracedBlock
) -> Variant:
    code = graph.python_code("self")
    modes = any(n.target in (set_grad_mode, enter_autocast) for n in graph.nodes)
    function = _function(rewrite.original.__name__, code.src, code.globals)
    return Variant(code.src.strip(), function, order, traced.writes, traced.kind, modes)


_functions: WeakValueDictionary[Any, Callable[..., Any]] = WeakValueDictionary()


def _function(label: str, source: str, names: Mapping[str, Any]) -> Callable[..., Any]:
    """The function `forward` of a source and the objects that it names; one for blocks alike.

    Dynamo compiles each code object by itself, and none beyond its limit. It keeps what it compiled
    among a function's globals, so that functions with other globals need code of their own.
    """
    # What lives in a function's globals keeps its id as long as the function.
    key = label, source, frozenset((name, id(value)) for name, value in names.items())
    found = _functions.get(key)
    if found is None:
        file = f"<mhc_compile {label} {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        scope = dict(names)
        exec(compile(source, file, "exec"), scope)
        found = _functions[key] = scope["forward"]
    return found


def _stream_position(rewrite: BlockRewrite) -> tuple[int, int]:
    first = rewrite.plan.segments[0]
    return first.sites[0].stream, first.first_index
