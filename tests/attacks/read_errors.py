"""Reads models from a disk that fails: `python -m attacks.read_errors`, from this folder's parent. Linux, as root.

The disk is a loop device whose file ends within the model, so that what lies beyond cannot be read. Verbs end with one sentence
then, and the next run leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.builds import ROOT
from support.command_line import cli
from support.models import convert

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
N_ENDS = 12
SECONDS = 200


def system(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


@contextmanager
def disk(model: Path) -> Iterator[tuple[Path, Path]]:
    """A copy of a model on a disk, and the file that the disk is in."""
    with tempfile.TemporaryDirectory() as name:
        content, image, place = (Path(name, part) for part in ("content", "image", "disk"))
        content.mkdir()
        place.mkdir()
        shutil.copyfile(model, content / "model.gguf")
        image.touch()
        os.truncate(image, int(1.1 * model.stat().st_size) + (16 << 20))
        system("mke2fs", "-q", "-t", "ext2", "-d", content, image)
        device = system("losetup", "--show", "-f", "-r", image).strip()
        try:
            system("mount", "-o", "ro", device, place)
            try:
                yield place / "model.gguf", image
            finally:
                system("umount", place)
        finally:
            system("losetup", "-d", device)


def attempt(command: list[object], output: Path) -> tuple[int, bytes, str]:
    """Exit code, what was written or else printed, and the errors, with nothing of the disk in memory."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    try:
        done = cli(*command, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 124, b"", "it hangs"
    written = output.read_bytes() if output.exists() else done.stdout.encode()
    output.unlink(missing_ok=True)
    if done.returncode == 0 and (left := os.listdir(output.parent)):
        return 1, written, f"{left} is left of earlier runs"
    return done.returncode, written, done.stderr


def main() -> int:
    """Let the disks of a source and of a converted model end at several places. Returns how many runs went wrong."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        output = Path(name, "outputs", "x.gguf")
        output.parent.mkdir()
        converted = convert(MODEL, Path(name, "converted.gguf"), type="q8_0", keep_weights=True).output
        for model in (MODEL, converted):
            with disk(model) as (path, image):
                to = [path, "-o", output, "--type", "q8_0"]
                commands: list[list[object]] = [["revert", path, "-o", output], ["inspect", path], ["verify", MODEL, path]]
                if model == MODEL:  # not verify: llama.cpp maps a file as a whole, and Linux then tries without end to read it
                    commands = [["plan", path], ["convert", *to], ["convert", "--sidecar", *to]]
                whole = [attempt(command, output) for command in commands]
                assert all(code == 0 for code, *_ in whole), whole
                for end in reversed(range(1, model.stat().st_size, model.stat().st_size // N_ENDS)):
                    os.truncate(image, end)
                    for command, (_, expected, _) in zip(commands, whole, strict=True):
                        code, written, errors = attempt(command, output)
                        sentence = errors.splitlines()[-1] if errors else ""
                        good = code in (1, 2) and sentence.startswith("gguf-firstlayer: ") and "Traceback" not in errors
                        if code == 0:  # all that it needs could be read
                            good = written == expected and command[0] != "verify"
                        counts["succeeded" if code == 0 else "refused"] += 1
                        counts["wrong"] += not good
                        verdict = "" if good else "wrong: "
                        print(f"{command[0]}, {end:,} bytes of a disk: exit code {code}, {verdict}{sentence}", flush=True)
    print(dict(counts))
    return counts["wrong"]


if __name__ == "__main__":
    sys.exit(bool(main()))
