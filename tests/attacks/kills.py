"""Kills conversions, sidecars and reversions at random moments: `python -m attacks.kills N`, from this folder's parent."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from attacks.faults import Bench


def main(n_kills: int) -> int:
    """Check that the source stays, and the output is absent or whole, or the one that `--force` replaces; and that the next run
    leaves nothing of killed ones behind. A split model is absent without its first part.
    """
    wrong = killed = writing = 0
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        commands = {
            output: [sys.executable, "-m", "gguf_firstlayer", *map(str, words)] for output, words in bench.commands.items()
        }
        seconds = {}
        for output, command in commands.items():
            start = time.monotonic()
            subprocess.run(command, check=True, capture_output=True)
            seconds[output] = time.monotonic() - start
            bench.clear()

        for _ in range(n_kills):
            output, replaces = random.choice(list(commands)), random.random() < 0.5
            old, whole = bench.replaced(output) if replaces else {}, bench.whole[output]
            with subprocess.Popen(
                [*commands[output], *["--force"] * replaces], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as process:
                if random.random() < 0.5:
                    time.sleep(random.uniform(0.3, 1.1) * seconds[output])
                else:  # while it writes
                    n_before = len(os.listdir(bench.folder))
                    while process.poll() is None and len(os.listdir(bench.folder)) == n_before:
                        pass
                    time.sleep(random.uniform(0, 0.1))
                process.kill()
            killed += process.returncode != 0
            writing += any(bench.folder.glob(".*.part"))
            found = bench.outputs()
            is_absent = len(whole) > 1 and min(whole) not in found
            if bench.source.read_bytes() != bench.before or not (is_absent or found in (whole, old)):
                wrong += 1
                print(f"{output}: the source changed, or the output is not whole", flush=True)
            bench.clear()
        left = len(os.listdir(bench.folder)) - 1
        for output, command in commands.items():
            subprocess.run(command, check=True, capture_output=True)
            wrong += bench.outputs() != bench.whole[output]
            bench.clear()
        wrong += os.listdir(bench.folder) != [bench.source.name]
    print(f"{killed} of {n_kills} killed, {writing} while they wrote, {left} folders left for the next run, {wrong} wrong")
    return wrong + (writing == 0)


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]))))
