"""Models with tables of tensors that conversion would not choose, as a hostile file may have; `main` tries many."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from architectures import PLM, differences
from support.builds import PATCHED, run
from support.models import convert, write_archs

from gguf_firstlayer import FirstLayerError


def check(source: Path, seed: int, flash: int, folder: Path) -> bool:
    """Convert a quarter of all possible sites, at random, and compare with the stock library. Returns whether one is used."""
    os.environ["LLAMA_FIRSTLAYER_SAMPLE_SITES"] = str(seed)
    try:
        # with all weights, a site that cannot be replaced is computed; without, the file would be refused
        converted = convert(source, folder / "any.gguf", type="f32", force=True, keep_weights=True).output
    finally:
        del os.environ["LLAMA_FIRSTLAYER_SAMPLE_SITES"]
    differences(source, converted, [1, 2, 7, 64], flash, n_sequences=4)
    return any(used for *_, used in run(PATCHED, {"run": "uses", "model": str(converted)})[0])


def main(n_seeds: int) -> int:
    """Check all architectures. Returns how many checks failed."""
    n_checks = n_used = n_failed = 0
    with tempfile.TemporaryDirectory() as name:
        models = Path(name, "models")
        models.mkdir()
        write_archs(models)
        for path in sorted(models.glob("*.gguf")):
            for seed in range(n_seeds):
                for flash in (0,) if path.stem == PLM else (0, 1):
                    n_checks += 1
                    try:
                        n_used += check(path, seed, flash, Path(name))
                    except FirstLayerError as err:
                        if "nothing to precompute" not in str(err):
                            raise
                    except AssertionError as err:
                        n_failed += 1
                        print(f"{path.stem}, seed {seed}, flash attention {flash}: {err}", flush=True)
    print(f"{n_checks} checks, in {n_used} of which tables are used, {n_failed} failed")
    return n_failed + (n_used == 0)


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]))))
