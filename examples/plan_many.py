"""Show what converting each model in a folder would gain, the largest gain first: `python examples/plan_many.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from gguf_firstlayer import FirstLayerError, plan


def main(folder: str) -> None:
    """Print a line for each model; those that cannot be read or have nothing to precompute come last."""
    plans, problems = [], []
    for path in sorted(Path(folder).glob("*.gguf")):
        try:
            result = plan(path)
        except FirstLayerError as err:
            problems.append(str(err))
            continue
        if result.blocker:
            problems.append(f"{path.name}: nothing to precompute: {result.blocker}")
        else:
            plans.append(result)
    print(f"{'model':40} {'decoding':>9} {'prefill':>9} {'file':>8}")
    for result in sorted(plans, key=lambda each: each.decode_bound, reverse=True):
        growth = result.file_change / result.file_bytes
        print(f"{result.name:40} {result.decode_bound:9.4f} {result.prefill_bound:9.4f} {growth:+8.1%}")
    print("\n".join(problems), file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
