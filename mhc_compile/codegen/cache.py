"""Loads generated kernels; their sources are kept as files in a private directory of the user."""

from __future__ import annotations

import atexit
import functools
import hashlib
import linecache
import os
import shutil
import stat
import sys
import tempfile
import threading
import types
from pathlib import Path
from typing import Any

import platformdirs

from mhc_compile.codegen.render import render
from mhc_compile.codegen.spec import KernelSpec
from mhc_compile.errors import MHCError

ENV = "MHC_COMPILE_CACHE"
_lock = threading.Lock()
_kernels: dict[KernelSpec, Any] = {}


def cache_directory() -> Path:
    """Where the sources are kept: $MHC_COMPILE_CACHE, else the user's cache directory."""
    chosen = os.environ.get(ENV)
    return Path(chosen).absolute() if chosen else platformdirs.user_cache_path("mhc_compile")


def checked(directory: Path) -> Path:
    """Creates the directory where needed; refuses one into which somebody else can write.

    Raises:
        MHCError: it belongs to another user, or others can write into it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    remedy = f"set {ENV} to a directory of your own, or leave it to be created"
    status = directory.stat()
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        raise MHCError(f"kernel cache {directory} belongs to user id {status.st_uid}: {remedy}")
    if hasattr(os, "geteuid") and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise MHCError(
            f"kernel cache {directory} can be written by other users: chmod 700 it, or {remedy}"
        )
    return directory


@functools.cache
def _temporary_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="mhc_compile_"))  # mode 0700
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _keep(directory: Path, name: str, content: bytes) -> Path:
    path = directory / name
    if not (path.is_file() and not path.is_symlink() and path.read_bytes() == content):
        write_whole(path, content)  # processes that race write the same content
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that other processes read all of it, or what was there before."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_source(text: str, stem: str) -> Path:
    """Writes a kernel's text under its SHA-256, unless that file is there and intact.

    Where the cache cannot be written (a read-only or full file system, no home directory), the
    file goes to a temporary directory that is removed when the process ends.

    Raises:
        MHCError: the cache directory belongs to another user, or others can write into it.
    """
    content = text.encode()
    name = f"{stem}_{hashlib.sha256(content).hexdigest()}.py"
    try:
        return _keep(checked(cache_directory()), name, content)
    except OSError:
        return _keep(_temporary_directory(), name, content)


def _module(text: str, path: Path) -> types.ModuleType:
    """Runs the text in hand, not the file, which may have changed since it was compared."""
    module = types.ModuleType(f"mhc_compile_kernels.{path.stem}")
    module.__file__ = str(path)
    # Without a time, linecache never asks the disk again: Triton sees the text that runs here.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    exec(compile(text, str(path), "exec"), module.__dict__)
    sys.modules[module.__name__] = module
    return module


def load(spec: KernelSpec) -> Any:
    """The Triton kernel of a spec: a `triton.JITFunction`, one a process for equal specs.

    With TRITON_INTERPRET=1 it is what `triton.jit` then returns, see `interpreter.py`.

    Raises:
        MHCError: as `write_source`.
    """
    with _lock:
        if spec not in _kernels:
            text = render(spec)
            module = _module(text, write_source(text, spec.op))
            _kernels[spec] = getattr(module, spec.function)
        return _kernels[spec]
