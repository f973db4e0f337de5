"""Runs functions of this package in a child process: on hostile files, llama.cpp aborts its process."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Concatenate, Generic, ParamSpec, TypeVar, cast

from gguf_firstlayer.errors import UNREADABLE, Caller, FirstLayerError
from gguf_firstlayer.start import STOPPING, imported_from, interrupt

T = TypeVar("T")
U = TypeVar("U")
P = ParamSpec("P")

# seconds that a child has to remove what it has written, when it is interrupted
CLEAN_UP = 5.0

# With -I and -c, Python imports nothing from the working directory, from environment variables or from the user's own folder.
# The child gets its parent's import path, and this package from its own folder, which need not be on that path
_CHILD = """
import importlib.util, sys
sys.path[:], folder = {path!r}, {folder!r}
spec = importlib.util.spec_from_file_location("gguf_firstlayer", f"{{folder}}/__init__.py", submodule_search_locations=[folder])
sys.modules["gguf_firstlayer"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from gguf_firstlayer.isolation import serve
serve()
"""


class EndedError(FirstLayerError):
    """A child process has ended, so nothing more can be asked of it."""


def isolated(function: Callable[[Path], T], path: Path) -> T:
    """Call a function of this package for a model in a child process. Returns the function's result.

    Raises:
        FirstLayerError: as of `Isolated.call`.
    """
    with Process(path) as process:
        return process.model.call(function)


class Process:
    """A child process that holds objects, which functions of this package make and use there. A context manager.

    Args:
        path: of a model

    Attributes:
        model: the first of the objects, this path
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        code = _CHILD.format(path=imported_from(), folder=str(Path(__file__).resolve().parent))
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # on an abort, ggml would start a debugger, which would hold up the child
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        )
        self._requests, self._answers = cast(IO[bytes], self._child.stdin), cast(IO[bytes], self._child.stdout)
        self._told = b""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        with suppress(OSError):  # it has ended: the first call tells why
            self._send((Caller.is_command_line, path))
        self.model: Isolated[Path] = Isolated(self, 0)

    def _listen(self) -> None:
        """Keep what the child prints, which would wait if nobody read it."""
        with cast(IO[bytes], self._child.stderr) as stream:
            self._told = stream.read()

    def _send(self, message: object) -> None:
        pickle.dump(message, self._requests)
        self._requests.flush()

    def _receive(self) -> object:
        try:
            return pickle.load(self._answers)
        except Exception:  # there is no answer, or it is none
            raise self._reason() from None

    def ask(self, index: int, function: Callable[..., object], arguments: tuple[Any, ...], keep: bool) -> object:
        """Call a function with one of the objects. Returns its result, or the number of the object that it is from then on.

        Raises:
            FirstLayerError: as of `Isolated.call`.
        """
        try:
            if not self._requests.closed:
                self._send((index, function, arguments, keep))
            result = self._receive()
        except OSError:
            raise self._reason() from None
        except BaseException:
            self._end()
            raise
        if isinstance(result, MemoryError):
            raise FirstLayerError(f"{self._path}: out of memory; close other programs, or use a smaller model") from result
        if isinstance(result, OSError):
            raise FirstLayerError(f"{result.filename or self._path}: {result.strerror or result}") from result
        if isinstance(result, FirstLayerError):
            raise result
        return result

    def _reason(self) -> EndedError:
        """Why the child has ended, or ends now, as what it answers makes no sense."""
        with suppress(OSError):
            self._requests.close()
        code = self._child.wait()
        self._listener.join()
        lines = self._told.decode(errors="replace").splitlines()
        if code == _code("SIGBUS") or any(UNREADABLE in line for line in lines):
            return EndedError(f"{self._path}: {UNREADABLE}")
        if code == _code("SIGKILL"):
            return EndedError(f"{self._path}: the system killed llama.cpp, perhaps for lack of memory; close other programs")
        if any(line.startswith("Traceback") for line in lines):
            return EndedError(f"{self._path} cannot be analysed ({lines[-1]}); please report this")
        asserted = [line for line in lines if "ASSERT" in line or "error" in line.lower()]
        return EndedError(f"{self._path}: llama.cpp cannot run this model ({asserted[0] if asserted else 'it crashed'})")

    def _end(self) -> None:
        """End the child, which first removes what it has written."""
        self._child.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(CLEAN_UP)
        self._child.kill()
        self._child.wait()

    def close(self) -> None:
        """End the child, once it has nothing to do."""
        with suppress(OSError):
            self._requests.close()
        self._answers.close()
        self._child.wait()
        self._listener.join()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Isolated(Generic[T]):
    """An object in a child process."""

    def __init__(self, process: Process, index: int) -> None:
        self.process, self.index = process, index

    def call(self, function: Callable[Concatenate[T, P], U], *arguments: P.args, **named: P.kwargs) -> U:
        """Call a function of this package with the object, and others that can be pickled. Returns its result, likewise.

        Raises:
            FirstLayerError: the function raises it, an OSError or a MemoryError, or llama.cpp aborts: then it is `EndedError`.
        """
        return cast(U, self.process.ask(self.index, partial(function, **named), arguments, False))

    def make(self, function: Callable[Concatenate[T, P], U], *arguments: P.args, **named: P.kwargs) -> Isolated[U]:
        """The same, but its result stays in the child process."""
        return Isolated(self.process, cast(int, self.process.ask(self.index, partial(function, **named), arguments, True)))


def _code(name: str) -> int | None:
    """The exit code of a child that a signal has ended; None where there is no such signal."""
    number = getattr(signal, name, None)
    return None if number is None else -number


def serve() -> None:
    """The child's side of `Process`."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    Caller.is_command_line, path = pickle.load(sys.stdin.buffer)
    objects = [path]
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # whatever libraries print is no part of the answers
        for index, function, arguments, keep in _requests():
            try:
                result = function(objects[index], *arguments)
                if keep:
                    objects.append(result)
                    result = len(objects) - 1
                answer = pickle.dumps(result)
            except (FirstLayerError, OSError, MemoryError) as err:
                answer = pickle.dumps(err)
            answers.write(answer)
            answers.flush()


def _requests() -> Iterator[tuple[int, Callable[..., object], tuple[Any, ...], bool]]:
    """What the parent asks for, until it has ended or needs nothing more."""
    with suppress(EOFError):
        while True:
            yield pickle.load(sys.stdin.buffer)
