"""How results are shown: numbers and progress for people, JSON for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gguf import GGMLQuantizationType
from tqdm import tqdm

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)

# messages while a verb works; the command line prints them to stderr, other programs do as they like
log = logging.getLogger("gguf_firstlayer")


def size_text(n: float) -> str:
    """A number of bytes with a suitable unit."""
    if 0 < abs(n) < 1024:
        return f"{n:.0f} byte{'' if round(n) == 1 else 's'}"
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if abs(n) >= 2**power * (1 - 2**-14):  # what is rounded to one
            return f"{n / 2**power:.{2 if power == 30 else 1}f} {unit}"
    return f"{n / 2**10:.1f} KiB"


def change_text(n: float) -> str:
    """A growth (+) or shrinkage (-) in bytes."""
    return f"{'-' if n < 0 else '+'}{size_text(abs(n))}"


def count(n: int, noun: str) -> str:
    """A number of things: `1 table`, `2 tables`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def numbers(text: str) -> list[int]:
    """A list of numbers like `1,16`, as an argument of the command line.

    Raises:
        argparse.ArgumentTypeError: it is not such a list.
    """
    if not all(part.isascii() and part.isdecimal() and len(part) < 16 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers like 1,16")
    return [int(part) for part in text.split(",")]


def progress(task: str, total: int, unit: str) -> tqdm[Any]:
    """A progress bar on a terminal; elsewhere one line at the start."""
    if not sys.stderr.isatty():
        log.info("%s: %s", task, count(total, unit))
    return tqdm(total=total, desc=task, unit=unit, disable=None)


def to_json(result: DataclassInstance) -> str:
    """A result as JSON: types by their names, files as strings, and null for numbers that are not finite."""

    def encode(value: Any) -> Any:
        if isinstance(value, GGMLQuantizationType):
            return value.name.lower()
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, list | tuple):
            return [encode(item) for item in value]
        if isinstance(value, dict):
            return {key: encode(item) for key, item in value.items()}
        return str(value) if isinstance(value, Path) else value

    return json.dumps(encode(dataclasses.asdict(result)), indent=2, allow_nan=False)


def printable(text: str) -> str:
    """A line for a terminal: control characters, such as names in a file may hold, are written as escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def show(result: T, as_json: bool, summary: Callable[[T], list[str]]) -> None:
    """Print a result, as JSON or as readable text."""
    print(to_json(result) if as_json else "\n".join(map(printable, summary(result))))


def show_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of names and figures, with lines on a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    is_terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if is_terminal else None, pad_edge=False)
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(highlight=False)
    wide = console.options.update_width(10_000)
    if not is_terminal or console.measure(table, options=wide).maximum > console.width:
        console.width = 10_000  # the terminal wraps long lines, and keeps all of their figures
    console.print(table)


class Printable(logging.Formatter):
    """Makes messages `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """The message of a record."""
        return printable(super().format(record))
