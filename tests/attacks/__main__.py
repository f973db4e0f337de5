"""Writes a hostile file: `python -m attacks NAME MODEL OUTPUT`, from this folder's parent. Without arguments, lists them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef forge(" in path.read_text())

if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in NAMES:
        importlib.import_module(f"attacks.{sys.argv[1]}").forge(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        for name in NAMES:
            print(f"{name:28}{importlib.import_module(f'attacks.{name}').__doc__.splitlines()[0]}")
