"""Cuts a forward or backward graph where the server changes, and runs each piece on its stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module
from torch.utils._pytree import tree_leaves

from mhc_compile._torch_compat import boxed, is_view_call
from mhc_compile.backend.graph_nodes import call_name, has_backward
from mhc_compile.backend.records import Piece
from mhc_compile.backend.tag_ops import OP, SERVER

Lower = Callable[[GraphModule], Callable[..., Any]]


def cut(gm: GraphModule) -> tuple[GraphModule, list[Piece]]:
    """Returns a module that calls one submodule a piece, and the pieces in their order.

    Calls without a tag, and such that look at memory in another way, go with the call before them.
    In a backward all-to-alls alone are apart: the plan has the rest of it on the compute server.
    """
    backward = has_backward(gm.graph)
    number: dict[Node, int] = {}
    servers: list[str] = []
    ops: list[dict[str, None]] = []
    for node in gm.graph.nodes:
        if not node.op.startswith("call_"):
            continue
        if call_name(node) == "getitem" and node.args[0] in number:
            number[node] = number[node.args[0]]
            continue
        tags = {} if _is_view(node) else node.meta.get("custom") or {}
        server = _server(node, tags, backward) or (servers[-1] if servers else "compute")
        if not servers or server != servers[-1]:
            servers.append(server)
            ops.append({})
        number[node] = len(servers) - 1
        if OP in tags:
            ops[-1][tags[OP]] = None
    whole = split_module(gm, gm, number.__getitem__, keep_original_order=True)  # type: ignore[arg-type]
    place = _numbers(whole)
    after = {k: tuple(sorted(_producers(node, place))) for node, k in place.items()}
    pieces = [
        Piece(server, tuple(names), after.get(k, ()))
        for k, (server, names) in enumerate(zip(servers, ops, strict=True))
    ]
    return whole, pieces


def run_in_pieces(
    gm: GraphModule, lower: Lower, found: dict[str, list[Piece]]
) -> Callable[..., Any]:
    """Compiles each piece of a graph and returns what runs them in order.

    On CUDA a piece of another server than "compute" has a stream of its own, of high priority for
    "hp"; events make it wait for what it reads, and the caller's stream for the results.

    Args:
        gm: a forward or backward graph.
        lower: compiles a piece.
        found: takes the pieces of the "forward" or the "backward", for the report.
    """
    whole, pieces = cut(gm)
    found["backward" if has_backward(gm.graph) else "forward"] = pieces
    runs, place = _Runs(pieces), _numbers(whole)
    last = sorted(_producers(whole.graph.output_node(), place))
    for node, k in place.items():
        name = str(node.target)
        setattr(whole, name, _Call(runs, k, lower(whole.get_submodule(name))))  # type: ignore[arg-type]
    call = boxed(whole)

    def run(args: list[Any]) -> Any:
        out = call(args)
        runs.join(last, out)
        return out

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _Runs:
    """Streams and events of the pieces of one graph."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self._done: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}

    def run(self, k: int, body: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Runs a piece behind those that it reads from."""
        piece = self.pieces[k]
        device = next((a.device for a in args if isinstance(a, Tensor) and a.is_cuda), None)
        if device is None:
            return body(*args)
        stream = torch.cuda.current_stream(device)
        if piece.server != "compute":
            own = _stream(device, piece.server)
            own.wait_stream(stream)  # inputs of the graph are ready there
            stream = own
        self._wait(stream, piece.after)
        for tensor in args:  # its memory may be another stream's
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            out = body(*args)
        self._done[k] = stream, stream.record_event()
        return out

    def join(self, last: Sequence[int], out: Any) -> None:
        """Lets the caller's stream wait for the pieces that made the results."""
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_cuda]
        if results:
            here = torch.cuda.current_stream(results[0].device)
            self._wait(here, last)
            for tensor in results:
                tensor.record_stream(here)

    def _wait(self, stream: torch.cuda.Stream, pieces: Sequence[int]) -> None:
        for k in pieces:
            other, event = self._done.get(k, (stream, None))
            if event is not None and other != stream:
                stream.wait_event(event)


class _Call(nn.Module):
    """A piece in the module that calls all."""

    def __init__(self, runs: _Runs, number: int, body: Callable[..., Any]) -> None:
        super().__init__()
        self._what = runs, number, body

    def forward(self, *args: Any) -> Any:
        """Runs it."""
        runs, number, body = self._what
        return runs.run(number, body, args)


@functools.cache
def _stream(device: torch.device, server: str) -> torch.cuda.Stream:
    """A server's stream, one for the process and device."""
    return torch.cuda.Stream(device, priority=-1 if server == "hp" else 0)


def _numbers(whole: GraphModule) -> dict[Node, int]:
    """The numbers of the pieces by the calls that run them."""
    calls = whole.graph.find_nodes(op="call_module")
    return {node: int(str(node.target).rsplit("_", 1)[1]) for node in calls}


def _is_view(node: Node) -> bool:
    return is_view_call(node) or call_name(node).startswith("detach")


def _server(node: Node, tags: dict[str, Any], backward: bool) -> str | None:
    if "all_to_all" in call_name(node):
        return "a2a"
    if call_name(node).startswith("wait_tensor"):
        return None  # with the call that it waits for
    server = tags.get(SERVER)
    return "compute" if backward and server is not None else server


def _producers(node: Node, place: dict[Node, int]) -> Iterator[int]:
    seen: set[Node] = set()
    todo = list(node.all_input_nodes)
    while todo:
        source = todo.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in place:
            yield place[source]
        elif source.op != "placeholder":
            todo += source.all_input_nodes
