"""Step 3, trace: the forward of one block as a torch.fx graph, submodules kept as calls.

The block's Python runs on proxies that carry real values. Branches and type checks therefore
take the way that the example takes, and what they depended on becomes a guard of the graph.
Sizes stay symbolic. Submodules run for real, on copies, to learn the structure of their results.
What the forward does besides computing its result is repeated by the graph or refused.
"""

from __future__ import annotations

import contextlib
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from mhc_compile._torch_compat import Source, force_eager, is_internal, no_nested_tensor_fastpath
from mhc_compile.errors import MHCError, TraceError
from mhc_compile.passes.call_paths import LeafPath
from mhc_compile.passes.containers import CONSTANTS
from mhc_compile.passes.mode_calls import recorded_modes
from mhc_compile.passes.module_access import ModuleAccess
from mhc_compile.passes.opaque_calls import (
    forward_codes,
    function_to_skip,
    opaque_classes,
    opaque_functions,
)
from mhc_compile.passes.opened_modules import call_opened
from mhc_compile.passes.python_effects import PythonEffects
from mhc_compile.passes.record import patched_module_call
from mhc_compile.passes.trace_errors import Restart
from mhc_compile.passes.trace_guards import Guard
from mhc_compile.passes.trace_inputs import Write, add_inputs, plain
from mhc_compile.passes.trace_patches import (
    inlined_script_functions,
    patched_factories,
    patched_grad_mode,
    patched_isinstance,
)
from mhc_compile.passes.tracer import Tracer
from mhc_compile.passes.undo import rehearsed
from mhc_compile.passes.whole_calls import kept_autograd_functions, kept_checkpoints

__all__ = ["CONSTANTS", "TracedBlock", "trace_block"]

_MOST_RESTARTS = 50


@dataclass
class TracedBlock:
    """A block's forward as a graph.

    `inputs` are the paths of the placeholders in order. `guards` are `(node, value, source)`:
    values on which the block's control flow depended; `inspected` tells that the code asked for
    the type of an argument that was None. `opened` are the submodules that were traced into, with
    their class and whether they have hooks. `writes` are containers among the arguments that the
    forward changes: the graph then returns `(result, contents)`. `kind` is the class of the result
    if that is a dataclass; the graph returns a dict of its fields. `notes` tell what is otherwise
    than in the original, although it computes the same.
    """

    graph: fx.Graph
    inputs: dict[LeafPath, fx.Node]
    guards: list[Guard] = field(default_factory=list)
    inspected: bool = False
    opened: dict[str, tuple[type, bool, str]] = field(default_factory=dict)
    writes: tuple[Write, ...] = ()
    kind: type | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preparation:
    """What a trace keeps opaque, symbolic or inlined; found by tracing again and again."""

    functions: frozenset[types.FunctionType] = frozenset()
    classes: frozenset[type] = frozenset()
    symbolic: frozenset[str] = frozenset()
    inlined: frozenset[types.CodeType] = frozenset()

    def with_item(self, kind: str, item: Any) -> Preparation | None:
        """Adds an item, None if it is there already."""
        known = getattr(self, kind)
        return None if item in known else replace(self, **{kind: known | {item}})


_prepared: weakref.WeakKeyDictionary[Callable[..., Any], Preparation] = weakref.WeakKeyDictionary()
"""What earlier traces of a forward needed; its later ones need the same."""


@dataclass(frozen=True)
class _Task:
    block: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    opened: frozenset[str]
    label: str
    open_names: frozenset[str]
    sites: frozenset[Source]


def trace_block(
    block: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    opened: frozenset[str],
    label: str = "",
    open_names: frozenset[str] = frozenset(),
    sites: frozenset[Source] = frozenset(),
) -> TracedBlock:
    """Traces `forward(block, *args, **kwargs)`; nothing outside the graph is changed.

    Args:
        block: the owner of the residual adds.
        forward: its original, unbound forward.
        args: example positional arguments; tensors are plain, not streams.
        kwargs: example keyword arguments.
        opened: names of submodules to trace into.
        label: what messages call the block; its class's name if empty.
        open_names: arguments that are inputs of the graph even where the example has None.
        sites: source lines of residual adds; what holds one is traced into.

    Returns:
        The graph, its inputs and guards.

    Raises:
        TraceError: the forward does something that a graph cannot hold; the message names the
            source line.
    """
    name = label or type(block).__name__
    task = _Task(block, forward, args, kwargs, opened, name, open_names, sites)
    codes = forward_codes([block, *map(block.get_submodule, opened)])
    preparation, first = _prepared.get(forward, Preparation()), None
    for _ in range(_MOST_RESTARTS):
        try:
            traced = _trace_once(task, preparation)
            _prepared[forward] = preparation
            return traced
        except Restart as restart:
            error: Exception = restart
            more = preparation.with_item(restart.kind, restart.item)
        except Exception as failure:
            error, first = failure, first or failure
            function = function_to_skip(failure, codes, preparation.functions, sites)
            more = preparation.with_item("functions", function) if function else None
        if more is None:
            break
        preparation = more
    error = first or error
    if isinstance(error, MHCError):
        raise error
    raise TraceError(
        f"cannot trace {name} at {_error_source(error)}: {type(error).__name__}: {error}; rewrite "
        "that line with torch operations, or move it into a submodule of its own"
    ) from error


def _trace_once(task: _Task, preparation: Preparation) -> TracedBlock:
    tracer = Tracer(task.block, task.opened, task.label, task.sites, call_opened)
    with rehearsed(task.block), torch.no_grad():
        args, kwargs, containers = add_inputs(
            tracer, task.forward, task.args, task.kwargs, task.open_names
        )
        access = ModuleAccess(tracer, preparation.symbolic)
        with contextlib.ExitStack() as stack:
            stack.callback(tracer.restore_overwritten)
            for patch in _patches(tracer, access, preparation):
                stack.enter_context(patch)
            effects = stack.enter_context(PythonEffects(tracer))
            out = task.forward(task.block, *args, **kwargs)
            with tracer.pause():
                _check_failed(tracer)
                effects.check()
                access.check_containers(effects.line_of_attribute)
                changed = containers.changed(out)
            returned = plain(out)
            kind = type(out) if returned is not out else None
            if changed:
                returned = (returned, tuple(plain(content) for _, content in changed))
            tracer.graph.output(tracer.create_arg(returned))
    tracer.guards.flush()
    return TracedBlock(
        tracer.graph, tracer.inputs, tracer.guards.guards, tracer.inspected, tracer.opened_seen,
        tuple(write for write, _ in changed), kind, tuple(dict.fromkeys(tracer.notes)),
    )  # fmt: skip


def _check_failed(tracer: Tracer) -> None:
    """Refuses code that went on behind a call that failed."""
    if tracer.failed is not None:
        error = tracer.failed
        raise TraceError(
            f"{tracer.label} catches the {type(error).__name__} of a call at "
            f"{_error_source(error)}, so its control flow depends on what fails, which a graph "
            "does not repeat; ask for the condition, or move that code into a submodule"
        ).with_traceback(error.__traceback__)


def _patches(
    tracer: Tracer, access: ModuleAccess, preparation: Preparation
) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Everything that is changed in torch and Python while a block's forward runs."""
    yield no_nested_tensor_fastpath()
    yield force_eager()
    yield patched_module_call(tracer.call_module)
    yield patched_isinstance()
    yield patched_factories(tracer)
    yield patched_grad_mode(tracer)
    yield inlined_script_functions()
    yield kept_autograd_functions(tracer)
    yield kept_checkpoints(tracer, preparation.inlined)
    yield recorded_modes(tracer)
    yield opaque_functions(tracer, preparation.functions)
    yield opaque_classes(tracer, preparation.classes)
    yield access.watched()
    yield tracer.record_functions()


def warn_of_notes(name: str, traced: TracedBlock) -> None:
    """Reports what a traced block does otherwise than the original."""
    for note in traced.notes:
        warnings.warn(f"block {name!r}: {note}", stacklevel=2)


def _error_source(error: BaseException) -> str:
    """The innermost line of user code in a traceback."""
    where = "an unknown line"
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if not is_internal(filename):
            where = f"{filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where
