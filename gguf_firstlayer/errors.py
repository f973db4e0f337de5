"""Errors for users, in the terms of the interface that they called."""

from __future__ import annotations

import sys
from pathlib import Path

# what a bus error says of a file that is mapped
UNREADABLE = "a file could not be read to its end: it became shorter, is gone, or its disk has errors"


class FirstLayerError(Exception):
    """Something that the user can act on; its message is one sentence that says what is wrong and what to do."""


class UsageError(FirstLayerError):
    """The call itself is wrong: an argument, or a combination of them."""


class Caller:
    """Who reads the messages: a Python program, unless `main` or the parent of an isolated process says otherwise."""

    is_command_line = False


def option(name: str, value: object = None) -> str:
    """An argument of a verb as the caller spells it: `--type` and `--max-growth 5%`, or `type=...` and `max_growth='5%'`."""
    if not Caller.is_command_line:
        return f"{name}={'...' if value is None else repr(value)}"
    spelled = "-o" if name == "output" else f"--{name.replace('_', '-')}"
    if value is None or value is True:
        return spelled
    return f"{spelled}{'=' if str(value).startswith('-') else ' '}{value}"


def program() -> list[str]:
    """The words that start the command line: those that the user typed, if any."""
    if not Caller.is_command_line or Path(sys.argv[0]).name == "__main__.py":
        return [Path(sys.executable).name.removesuffix(".exe"), "-m", "gguf_firstlayer"]
    return ["gguf-firstlayer"]
