"""The cost of decoding, counted instead of timed: instructions, and bytes read from a model's file. Linux on x86-64."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from gguf_firstlayer.decoder import Decoder

# valgrind does not support AVX-512, which the other builds use where available
COUNTED = Path(__file__).resolve().parent.parent.parent / "build" / "counted" / "bin"
N_TOKENS = 6
N_WARM = 2  # the first ones build graphs and fill caches


def instructions(path: Path, *, cached: bool = False) -> float:
    """Instructions to decode a token, as callgrind counts them, on one thread; with a row cache, one whose row is there."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
        command += ["--toggle-collect=llama_decode", "--dump-after=llama_decode"]
        done = subprocess.run(
            [*command, sys.executable, __file__, str(path), str(N_TOKENS), *(["cached"] if cached else [])],
            env=os.environ | {"LD_LIBRARY_PATH": str(COUNTED)},
            capture_output=True,
            text=True,
            check=True,
        )
        dumps = [Path(folder, f"out.{i + 1}") for i in range(N_TOKENS)]
        assert dumps[-1].exists(), done.stderr
        counts = [int(re.search(r"^totals: (\d+)", dump.read_text(), re.MULTILINE)[1]) for dump in dumps]
    return sum(counts[N_WARM:]) / (N_TOKENS - N_WARM)


def can_count() -> bool:
    """Whether valgrind is installed."""
    return shutil.which("valgrind") is not None


def bytes_read(path: Path) -> int:
    """Bytes of a file that are read to decode a token, in whole pages.

    Linux marks pages that are accessed (`/proc/PID/clear_refs`). Not for types that llama.cpp repacks into memory.
    """
    done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def _referenced(path: Path) -> int:
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            inside = fields[-1] == str(path)
        elif inside and fields[0] == "Referenced:":
            total += int(fields[1]) * 1024
    return total


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    with Decoder(path, 64, 16, 1, cache=64.0 if len(sys.argv) > 3 else 0.0) as run:
        if len(sys.argv) > 2:
            run.time([7] * int(sys.argv[2]), 1)
            return
        # pages that are mapped for the first time would be marked together with their neighbours
        run.time([7], 1)
        run.keep(0)
        Path("/proc/self/clear_refs").write_text("1")
        np.ones(1 << 26)  # evicts the processor's TLB: it does not mark pages again whose addresses it still holds
        run.time([7], 1)
        print(_referenced(path))


if __name__ == "__main__":
    main()
