"""Kills conversions, sidecars and reversions at random moments: `python -m attacks.kills N`, from this folder's parent."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.models import digest, write_archs


def main(n_kills: int) -> int:
    """Check that the source stays, the output is absent or whole, and the next run leaves nothing of killed ones behind."""
    wrong = killed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "work")
        folder.mkdir()
        write_archs(Path(name))
        source = Path(name, "llama-dense.gguf").rename(folder / "x.gguf")
        convert = [sys.executable, "-m", "gguf_firstlayer", "convert", source, "--type", "q8_0"]
        verbs = {
            "x-flp.gguf": convert,
            "x_firstlayer.gguf": [*convert, "--sidecar"],
            "y.gguf": [sys.executable, "-m", "gguf_firstlayer", "revert", Path(name, "kept.gguf"), "-o", folder / "y.gguf"],
        }
        subprocess.run([*convert, "--keep-weights", "-o", Path(name, "kept.gguf")], check=True, capture_output=True)
        whole, seconds = {}, {}
        for output, command in verbs.items():
            start = time.monotonic()
            subprocess.run(command, check=True, capture_output=True)
            seconds[output] = time.monotonic() - start
            whole[output] = digest(folder / output)
            (folder / output).unlink()
        before = digest(source)

        for _ in range(n_kills):
            output = random.choice(list(verbs))
            with subprocess.Popen(verbs[output], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                time.sleep(random.uniform(0.3, 1.1) * seconds[output])
                process.kill()
            killed += process.returncode != 0
            path = folder / output
            if digest(source) != before or (path.exists() and digest(path) != whole[output]):
                wrong += 1
                print(f"{output}: the source changed, or the output is not whole", flush=True)
            path.unlink(missing_ok=True)
        left = len(os.listdir(folder)) - 1
        for output, command in verbs.items():
            subprocess.run(command, check=True, capture_output=True)
            wrong += digest(folder / output) != whole[output]
        wrong += sorted(os.listdir(folder)) != sorted([source.name, *verbs])
    print(f"{killed} of {n_kills} killed, {left} folders left for the next run to remove, {wrong} wrong")
    return wrong + (killed == 0)


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]))))
