"""What a program must do before anything else is imported. In a process of somebody else's, importing this does nothing."""

from __future__ import annotations

import io
import os
import signal
import sys

# signals by which a user, or a terminal that closes, ends a program
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _is_program() -> bool:
    """Whether this is `gguf-firstlayer`, or `python -m gguf_firstlayer`, where Python is looking for the module right now."""
    if sys.argv[0] == "-m":
        return any(word.removeprefix("-m").split(".")[0] == "gguf_firstlayer" for word in sys.orig_argv)
    return os.path.basename(sys.argv[0]) in ("gguf-firstlayer", "gguf-firstlayer.exe")


def _open_streams() -> None:
    """Let a closed stream be an empty one: otherwise the first file that is opened takes its number, and gets its text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # takes the lowest number, which is this one; also in a program that `run` becomes
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def imported_from() -> list[str]:
    """The import path without the working directory, where a `numpy.py` may lie beside a model that was downloaded."""
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
            stream.reconfigure(errors="backslashreplace")  # names of files that the locale cannot spell
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` can answer it, Ctrl-C ends the program without a word
