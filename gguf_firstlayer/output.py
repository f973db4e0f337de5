"""Files that verbs write: checked beforehand, and complete or absent afterwards."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gguf_firstlayer.c_api import library, undisturbed
from gguf_firstlayer.errors import FirstLayerError, option
from gguf_firstlayer.text import log

if sys.platform != "win32":
    import fcntl

SUFFIX = ".part"

# a temporary folder, and the name of the output in it
_FOLDER = re.compile(rf"\.(.+)\.[a-z0-9_]+{re.escape(SUFFIX)}")


class Appeared:
    """The last file that this process has written whole, which an interruption does not take back."""

    last: Path | None = None


def check(output: Path, sources: Sequence[Path], force: bool, parts: bool = False, argument: str = "output") -> None:
    """Refuse an output that cannot or should not be written.

    Args:
        output: file
        sources: files that are read
        force: replace an existing file
        argument: the one that named the output
        parts: the output is the files `NAME-00001-of-0000N.gguf` instead

    Raises:
        FirstLayerError: the output is a source, exists, or is not a regular file, or its folder does not exist.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise FirstLayerError(f"{output} cannot be written: it is a folder, or its folder does not exist")
    # a link itself is replaced, not its target; so even a dangling link counts as existing
    existing = _parts(output) if parts else [output] if os.path.lexists(output) else []
    for path in existing:
        # like /dev/stdout, which must stay; a link to fd/1 on macOS
        is_stream = path.is_symlink() and os.readlink(path).startswith(("/proc/", "fd/"))
        if is_stream or (path.exists() and not stat.S_ISREG(path.stat().st_mode)):
            raise FirstLayerError(f"{path} is not a regular file; choose another name with {option(argument)}")
        if path.exists() and any(path.samefile(source) for source in sources):
            raise FirstLayerError(f"{path} is an input; choose another name with {option(argument)}")
    if not os.access(output.parent, os.W_OK):
        raise FirstLayerError(
            f"{output} cannot be written: nothing can be written to its folder; choose another name with {option(argument)}"
        )
    if existing and not force:
        raise _exists(existing[0], argument)


def _exists(path: Path, argument: str = "output") -> FirstLayerError:
    return FirstLayerError(
        f"{path} exists; replace it with {option('force', True)}, or choose another name with {option(argument)}"
    )


@contextmanager
def replacing(output: Path, force: bool) -> Iterator[Path]:
    """Yield a path with the output's name in a temporary folder beside it; at the end, the files in the folder move out.

    Args:
        output: file
        force: replace files that exist

    Raises:
        FirstLayerError: the output cannot be written, or exists by then.
    """
    folder: Path | None = None
    lock: int | None = None
    kept: list[Path] = []
    try:
        _remove_abandoned(output)
        with undisturbed():  # no interruption between the folder's creation and this assignment
            folder, lock = _make_folder(output)
        with library().writing(folder / output.name):
            yield folder / output.name
        parts = sorted(folder.iterdir(), reverse=True)  # the first part last: without it, a split model does not exist
        for part in parts:
            _sync(part)
        targets = [output.with_name(part.name) for part in parts]
        with undisturbed(), ExitStack() as undo:
            if force and len(parts) > 1:  # whatever happens, old and new parts are never taken for one model
                for target in reversed(targets):
                    _take_away(target, folder, undo, kept)
            for part, target in zip(parts, targets, strict=True):
                _appear(part, target, force)
                undo.callback(target.unlink)
            undo.pop_all()
            Appeared.last = output.with_name(parts[-1].name)
            _sync(output.parent)
        if len(parts) > 1 and (others := {path.name for path in _parts(output)} - {part.name for part in parts}):
            log.warning("still there, of an older output: %s", ", ".join(sorted(others)))
    except OSError as err:
        if err.errno == errno.EFAULT:  # a page of a mapped file is gone
            raise FirstLayerError(f"a source of {output} was truncated while it was read; nothing was written") from err
        names = ", ".join(sorted(old.name for old in kept))
        where = f"; what it was to replace could not be put back, and is in {folder}: {names}" if kept else ""
        raise FirstLayerError(f"{output} cannot be written: {err.strerror or err}{where}") from err
    finally:
        if folder is not None and kept:
            with suppress(OSError):
                (folder / "kept").touch()  # so that the next run does not take the folder for abandoned
        elif folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _parts(output: Path) -> list[Path]:
    """The files that are parts of an output, however many it has."""
    pattern = re.compile(rf"{re.escape(output.stem)}-\d{{5}}-of-\d{{5}}\.gguf")
    return sorted(path for path in output.parent.iterdir() if pattern.fullmatch(path.name))


def _take_away(target: Path, folder: Path, undo: ExitStack, kept: list[Path]) -> None:
    """Move a file that is to be replaced into a folder. Undoing it adds it to `kept` if it cannot be put back."""
    if target.is_dir() and not target.is_symlink():  # it would be removed, with what is in it
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    old = folder / f"{target.name}.old"
    with suppress(FileNotFoundError):
        target.replace(old)
        undo.callback(_put_back, old, target, kept)


def _appear(part: Path, target: Path, force: bool) -> None:
    """Move a file to its name; without `force`, only if nothing else has appeared there meanwhile."""
    if force:
        part.replace(target)
        return
    try:
        os.link(part, target)  # unlike a rename, never replaces anything
    except FileExistsError:
        raise _exists(target) from None
    except OSError:  # a file system without links
        try:
            _rename_to_new(part, target)
        except FileExistsError:
            raise _exists(target) from None


def _rename_to_new(part: Path, target: Path) -> None:
    """Rename a file, but never replace one; where the system cannot, an empty file takes the name first.

    Raises:
        FileExistsError: there is a file of that name.
        OSError: the system refuses.
    """
    if sys.platform == "win32":
        part.rename(target)
        return
    # glibc's and macOS's, with the place that stands for the working directory, and the flag that refuses to replace
    name, here, flag = ("renameatx_np", -2, 4) if sys.platform == "darwin" else ("renameat2", -100, 1)
    if (rename := getattr(ctypes.CDLL(None, use_errno=True), name, None)) is not None:
        if rename(here, os.fsencode(part), here, os.fsencode(target), flag) == 0:
            return
        if ctypes.get_errno() == errno.EEXIST:
            raise FileExistsError
    target.touch(exist_ok=False)
    try:
        part.replace(target)
    except BaseException:
        target.unlink()
        raise


def _put_back(old: Path, target: Path, kept: list[Path]) -> None:
    """Give a file that was replaced its name again, or add it to `kept`."""
    try:
        old.replace(target)
    except OSError:
        kept.append(old)
        raise


def _make_folder(output: Path) -> tuple[Path, int | None]:
    """A temporary folder, and the handle that locks it while this process lives, where the system supports such locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=SUFFIX, dir=output.parent))
        with suppress(FileNotFoundError):  # another process took it for abandoned, before it was locked
            if sys.platform == "win32":
                lock = os.open(_sign_of_life(folder), os.O_CREAT | os.O_WRONLY | os.O_TEMPORARY)
            else:
                lock = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # likewise
                    os.close(lock)
                    continue
                except OSError:  # a file system without locks
                    os.close(lock)
                    return folder, None
            if folder.exists():
                return folder, lock
            os.close(lock)


def _sign_of_life(folder: Path) -> Path:
    """On Windows, which cannot lock folders: a file that the system removes when its process ends, however that ends."""
    return folder.with_suffix(".open")


def _remove_abandoned(output: Path) -> None:
    """Remove the temporary folders that killed processes left beside this output: no process holds a lock on them."""
    for folder in output.parent.glob(f".*{SUFFIX}"):
        match = _FOLDER.fullmatch(folder.name)
        with suppress(OSError):
            stem = Path(match[1]).stem if match else None
            if stem is None or not all(entry.is_file() and entry.name.startswith(stem) for entry in folder.iterdir()):
                continue  # of another program
            if sys.platform == "win32":
                if not _sign_of_life(folder).exists():
                    shutil.rmtree(folder)
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def _sync(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
