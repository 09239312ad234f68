"""The disk cache of generated kernels: who may write it, what is run, and processes that race."""

import inspect
import multiprocessing
import os
import stat
import tempfile
from pathlib import Path

import pytest

from mhc_compile.codegen import cache
from mhc_compile.codegen.render import render
from mhc_compile.codegen.spec import KernelSpec, Tile
from mhc_compile.errors import MHCError

SPEC = KernelSpec("pre", 2, 32, "fp32", Tile(4, 32), "tf32x3", target="interpret")


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    path = tmp_path / "kernels"
    monkeypatch.setenv(cache.ENV, str(path))
    monkeypatch.setattr(cache, "_kernels", {})
    return path


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_load_is_private_and_memoised(directory):
    kernel = cache.load(SPEC)
    assert cache.load(SPEC) is kernel
    (name,) = files(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert name.startswith("pre_") and (directory / name).read_text() == render(SPEC)
    assert inspect.getsource(kernel.fn) in render(SPEC)


def test_source_without_its_file(directory):
    kernel = cache.load(SPEC)
    for name in files(directory):
        (directory / name).unlink()
    assert "def mhc_" in inspect.getsource(kernel.fn)


@pytest.mark.parametrize("content", ["", "raise SystemExit('tampered')\n"])
def test_changed_file_is_rewritten(directory, content, monkeypatch):
    cache.load(SPEC)
    (name,) = files(directory)
    (directory / name).write_text(content)
    monkeypatch.setattr(cache, "_kernels", {})
    cache.load(SPEC)
    assert (directory / name).read_text() == render(SPEC)


def test_link_is_not_followed(directory, tmp_path):
    path = cache.write_source("text = 1\n", "a")
    other = tmp_path / "other.py"
    other.write_text("text = 2\n")
    path.unlink()
    path.symlink_to(other)
    cache.write_source("text = 1\n", "a")
    assert not path.is_symlink() and other.read_text() == "text = 2\n"


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_directory_others_can_write(directory, mode):
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(MHCError, match="chmod 700") as error:
        cache.load(SPEC)
    assert str(directory) in str(error.value) and cache.ENV in str(error.value)
    assert not files(directory)


def test_directory_of_another_user(directory, monkeypatch):
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)
    with pytest.raises(MHCError, match=f"belongs to user id .*{cache.ENV}"):
        cache.load(SPEC)


def test_read_only_directory(directory, monkeypatch):
    """Root may write anywhere, hence a file where the directory should be, and a failing write."""
    directory.write_text("")
    kernel = cache.load(SPEC)
    place = Path(kernel.fn.__code__.co_filename).parent
    assert place.parent == Path(tempfile.gettempdir())
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_full_file_system(directory, monkeypatch):
    replace = os.replace

    def fails(source, target):
        if Path(target).parent == directory:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    assert cache.write_source("text = 1\n", "a").parent != directory
    assert not files(directory)  # no temporary file stays


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.ENV)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_directory() == tmp_path / "mhc_compile"


def write_many(directory, barrier, results):
    os.environ[cache.ENV] = str(directory)
    texts = [f"text = {i}\n" * 2000 for i in range(40)]
    barrier.wait()
    for text in texts:
        path = cache.write_source(text, "race")
        results.put(path.parent == directory and path.read_text() == text)


def test_eight_processes(directory):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    workers = [
        context.Process(target=write_many, args=(directory, barrier, results)) for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    assert all(results.get(timeout=60) for _ in range(8 * 40))
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(files(directory)) == 40  # and no temporary file
