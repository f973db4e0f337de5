"""Tables, and rows of a cache, of tensors that would not be chosen, as a hostile file may have them; `main` tries many."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from architectures import PLM, RANDOM, differences, only_embeds
from support.builds import PATCHED, STOCK, Cached, CachedAndDemanded, Demanded, run, same
from support.models import convert, write_archs

from gguf_firstlayer import FirstLayerError

BATCHES, N_SEQUENCES = [1, 2, 7, 64], 4

# a session of which demand leaves out much: prompts with several outputs
STEPS = [["decode", [[0], {"count": count, "seed": count}, outputs]] for count, outputs in ((40, 9), (30, 2), (41, 20))]

# how a file is refused without weights that it needs, when it is written and when a batch is computed
REFUSED = ("would not load", "which was replaced by a table")


def check(source: Path, seed: int, flash: int, folder: Path) -> Counter[str]:
    """Take a quarter of all possible sites, at random, for tables and for a row cache, and compare with the stock library.

    Returns what was compared, if it was used: tables with all weights and without, a row cache, and demand beside these.
    """
    done = Counter[str]()
    os.environ["LLAMA_FIRSTLAYER_SAMPLE_SITES"] = str(seed)
    try:
        # with all weights, a site that cannot be replaced is computed
        kept = convert(source, folder / "kept.gguf", type="f32", force=True, keep_weights=True).output
        differences(source, kept, BATCHES, flash, N_SEQUENCES)
        done["tables"] += any(used for *_, used in run(PATCHED, {"run": "uses", "model": str(kept)})[0])
        done["tables without weights"] += _without_weights(source, flash, folder)
        cached = Cached(source)
        differences(source, cached, BATCHES, flash, N_SEQUENCES)
        (outputs,) = run(PATCHED, {"run": "outputs", "model": cached, "batches": [64], "tokens": {"count": 64, "seed": 1}})
        done["row cache"] += outputs["cache"] is not None and outputs["cache"]["n_misses"] > 0
        if not flash and not only_embeds(source.stem) and source.stem not in {*RANDOM, "t5-dense"}:  # which encodes first
            done["demand"] += _demanded(source, Demanded(kept))
            if done["row cache"]:
                done["demand"] += _demanded(source, CachedAndDemanded(source))
    finally:
        del os.environ["LLAMA_FIRSTLAYER_SAMPLE_SITES"]
    return done


def _without_weights(source: Path, flash: int, folder: Path) -> bool:
    """Whether a file without the weights that its tables replace is right; otherwise, it is refused."""
    try:
        converted = convert(source, folder / "elided.gguf", type="f32", force=True)
        # loading looks at graphs without flash attention; those with it may need what is gone
        differences(source, converted.output, BATCHES, flash, N_SEQUENCES, graphs=())
    except (AssertionError, FirstLayerError) as err:
        if not any(sentence in str(err) for sentence in REFUSED):
            raise
        return False
    return bool(converted.elided)


def _demanded(source: Path, model: Path) -> bool:
    """Check what demand leaves of a model; whether that is less."""
    job = {"run": "session", "steps": [*STEPS, ["log"]], "context": Demanded.CONTEXT}
    (stock,), (ours,) = run(STOCK, job | {"model": source}), run(PATCHED, job | {"model": model})
    assert same(stock[:-1], ours[:-1]), "what is left of it differs"
    return "nobody reads" in ours[-1][0]


def main(n_seeds: int) -> int:
    """Check all architectures. Returns how many checks failed."""
    n_checks = n_failed = 0
    done = Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        models = Path(name, "models")
        models.mkdir()
        write_archs(models)
        for path in sorted(models.glob("*.gguf")):
            for seed in range(n_seeds):
                for flash in (0,) if path.stem == PLM else (0, 1):
                    n_checks += 1
                    try:
                        done += check(path, seed, flash, Path(name))
                    except FirstLayerError as err:
                        if "nothing to precompute" not in str(err):
                            raise
                    except AssertionError as err:
                        n_failed += 1
                        print(f"{path.stem}, seed {seed}, flash attention {flash}: {err}", flush=True)
    print(f"{n_checks} checks, {n_failed} failed; used: {dict(done)}")
    return n_failed + (len(done) < 4)


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]))))
