"""How results are shown: numbers and progress for people, JSON for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGMLQuantizationType
from tqdm import tqdm

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# messages while a verb works; the command line prints them to stderr, other programs do as they like
log = logging.getLogger("gguf_firstlayer")


def size_text(n: float) -> str:
    """A number of bytes with a suitable unit."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if abs(n) >= 2**power:
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
    """A result as JSON: types by their names, files as strings."""

    def encode(value: object) -> object:
        return value.name.lower() if isinstance(value, GGMLQuantizationType) else str(value)

    def factory(items: list[tuple[str, object]]) -> dict[str, object]:
        return {key: encode(value) if isinstance(value, GGMLQuantizationType | Path) else value for key, value in items}

    return json.dumps(dataclasses.asdict(result, dict_factory=factory), indent=2)
