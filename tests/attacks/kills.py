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

OLD = b"what --force replaces"


def main(n_kills: int) -> int:
    """Check that the source stays, and the output is absent or whole, or the one that `--force` replaces; and that the next run
    leaves nothing of killed ones behind.
    """
    wrong = killed = writing = 0
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
        Path(name, "old").write_bytes(OLD)
        digest_of_old = digest(Path(name, "old"))

        for _ in range(n_kills):
            output, replaces = random.choice(list(verbs)), random.random() < 0.5
            path, command = folder / output, verbs[output]
            if replaces:
                path.write_bytes(OLD)
                command = [*command, "--force"]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                if random.random() < 0.5:
                    time.sleep(random.uniform(0.3, 1.1) * seconds[output])
                else:  # while it writes
                    n_before = len(os.listdir(folder))
                    while process.poll() is None and len(os.listdir(folder)) == n_before:
                        pass
                    time.sleep(random.uniform(0, 0.1))
                process.kill()
            killed += process.returncode != 0
            writing += any(folder.glob(f".{output}.*"))
            found = digest(path) if path.exists() else None
            if digest(source) != before or found not in {whole[output], digest_of_old if replaces else None}:
                wrong += 1
                print(f"{output}: the source changed, or the output is not whole", flush=True)
            path.unlink(missing_ok=True)
        left = len(os.listdir(folder)) - 1
        for output, command in verbs.items():
            subprocess.run(command, check=True, capture_output=True)
            wrong += digest(folder / output) != whole[output]
        wrong += sorted(os.listdir(folder)) != sorted([source.name, *verbs])
    print(f"{killed} of {n_kills} killed, {writing} while they wrote, {left} folders left for the next run, {wrong} wrong")
    return wrong + (writing == 0)


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]))))
