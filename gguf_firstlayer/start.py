"""What our own program must do before it imports anything else. In another program, importing this does nothing."""

from __future__ import annotations

import io
import os
import signal
import sys

# signals by which a user or a closing terminal ends a program
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def interrupt(_signal: int, _frame: object) -> None:
    """Handle a signal that ends a program: once, as another one would interrupt the clean-up."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _is_program() -> bool:
    """Whether this is `gguf-firstlayer` or `python -m gguf_firstlayer`, for which Python is still looking for the module."""
    if sys.argv[0] == "-m":
        return any(word.removeprefix("-m").split(".")[0] == "gguf_firstlayer" for word in sys.orig_argv)
    return os.path.basename(sys.argv[0]) in ("gguf-firstlayer", "gguf-firstlayer.exe")


def _open_streams() -> None:
    """Replace closed streams by /dev/null: otherwise the next file that is opened gets their number, and their text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # takes the lowest free number, this one; inheritable, for the tool that `run` becomes
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def imported_from() -> list[str]:
    """The import path without the working directory, where a `numpy.py` may lie beside a downloaded model."""
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it was deleted
        here = ""
    places = [place for place in sys.path if isinstance(place, str)]  # Python ignores others
    return [place for place in places if os.path.isabs(place) and os.path.realpath(place) != here]


if getattr(sys, "argv", None) and _is_program():
    if sys.argv[0] == "-m":  # which puts the working directory first
        sys.path[:] = imported_from()
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for file names that the locale cannot encode
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` handles it, Ctrl-C ends the program silently
