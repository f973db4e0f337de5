"""`paths`: where the libraries and tools of the build are."""

from __future__ import annotations

import argparse
import json

from gguf_firstlayer.installation import paths as paths  # the function of this verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `paths`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Run `paths` from the command line."""
    found = {name: str(path) for name, path in paths().items()}
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for name, path in found.items():
            print(f"{name}: {path}")
    return 0
