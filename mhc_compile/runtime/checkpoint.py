"""Checkpoint files: safetensors for weights, one JSON manifest that names them; never pickle."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mhc_compile.errors import CheckpointError

MANIFEST = "mhc_compile.json"
FORMAT = "mhc_compile"
CONFIG_KEY = "mhc_compile"
"""The key under which a Hugging Face model's config.json holds the design and the sites."""
VERSION = 1


def write_checkpoint(
    directory: str | os.PathLike[str], tensors: Mapping[str, Tensor], **facts: Any
) -> None:
    """Writes tensors and facts so that a crash at any point leaves the old checkpoint or the new.

    The weights get a new file name; the manifest that names them replaces the old one in one step
    and comes last. Tensors that share memory, such as tied weights, are stored once.

    Args:
        directory: made if needed.
        tensors: by name, any device.
        **facts: JSON-safe values for the manifest.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    folder = Path(directory)
    stored, aliases = _without_shared(tensors)
    weights = f"mhc_compile-{secrets.token_hex(8)}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / weights) as path:
            save_file(stored, path, metadata={"format": "pt"})
        manifest = {"format": FORMAT, "version": VERSION, **facts, "weights": weights,
                    "bytes": (folder / weights).stat().st_size, "aliases": aliases}  # fmt: skip
        with _replacing(folder / MANIFEST) as path:
            path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint to {folder}: {error}") from error
    for old in folder.glob("mhc_compile-*.safetensors"):
        if old.name != weights:
            old.unlink(missing_ok=True)


def read_checkpoint(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_checkpoint` wrote, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing, truncated, damaged or of another version.
    """
    folder = Path(directory)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no {MANIFEST}; was it written by mhc_compile.save_pretrained?"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} is not a manifest of mhc_compile")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST} has version {manifest.get('version')!r}, this library reads "
            f"{VERSION}; update mhc_compile"
        )
    name = manifest.get("weights")
    if not isinstance(name, str) or os.path.basename(name) != name:
        raise CheckpointError(f"{folder / MANIFEST} names no weights file in its own folder")
    path = folder / name
    try:
        if path.stat().st_size != manifest.get("bytes"):
            raise CheckpointError(f"{path} has another size than its manifest says; it is damaged")
        tensors = load_file(path)
        for alias, target in manifest["aliases"].items():
            tensors[alias] = tensors[target]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tensors, manifest


def holds_manifest(directory: str | os.PathLike[str]) -> bool:
    """Whether `write_checkpoint` wrote to a directory."""
    return (Path(directory) / MANIFEST).exists()


def read_hugging_face(
    directory: str | os.PathLike[str],
) -> tuple[dict[str, Path], dict[str, Any]] | None:
    """Finds what a transformed Hugging Face model's own `save_pretrained` wrote.

    Returns:
        The file of each tensor, and the note in config.json; None if there is no such note.

    Raises:
        CheckpointError: there is one, but a file is missing or damaged.
    """
    folder = Path(directory)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    note = config.get(CONFIG_KEY) if isinstance(config, dict) else None
    if not isinstance(note, dict):
        return None
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if single.exists():
            with safe_open(single, "pt") as file:
                return dict.fromkeys(file.keys(), single), note
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / os.path.basename(file) for name, file in names.items()}, note
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} has the config of a transformed model, but neither {single.name} nor "
            f"{index.name} can be read: {error}"
        ) from error


def read_tensors(files: Mapping[str, Path], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields single tensors of safetensors files, on the CPU.

    Raises:
        CheckpointError: a file cannot be read.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(files[name], []).append(name)
    for path, inside in by_file.items():
        try:
            with safe_open(path, "pt") as file:
                for name in inside:
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, on disk, if the body succeeds."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _without_shared(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise CheckpointError(f"{name!r} is on the meta device and has no values to save")
        layout = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape,
                  tensor.stride(), tensor.dtype)  # fmt: skip
        if tensor.numel() and layout in first:
            aliases[name] = first[layout]
            continue
        first[layout] = name
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        stored[name] = copy
    return stored, aliases
