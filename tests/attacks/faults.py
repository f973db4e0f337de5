"""Lets the system's functions fail, one call after the other: `python -m attacks.faults`, from this folder's parent.

For conversions, sidecars and reversions, that write a file or replace one: the source stays, the output is as before or whole,
the error is one sentence, and the next run leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path

from support.builds import preload
from support.command_line import cli
from support.models import write_archs

# what may fail, and how: a full disk, one that cannot be written to, permissions that were taken away, file systems without
# links, locks or names that can be changed, and a folder that was removed
FAULTS = {
    "open64": [errno.EACCES, errno.ENOSPC, errno.EROFS],
    "write": [errno.ENOSPC, errno.EIO],
    "fsync": [errno.EIO],
    "ftruncate64": [errno.ENOSPC],
    "truncate64": [errno.EFBIG],
    "mkdir": [errno.EROFS, errno.ENOENT],
    "link": [errno.EPERM, errno.ENOENT],
    "linkat": [errno.EPERM, errno.ENOENT],
    "rename": [errno.EXDEV, errno.EACCES],
    "flock": [errno.ENOLCK],
}


def shim(folder: Path) -> Path:
    """The library that lets calls fail."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.cpp")
    subprocess.run(["c++", "-std=c++17", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    return library


class Bench:
    """Commands that write a file, or a split model, and what they write when nothing fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        write_archs(folder)
        self.source = Path(shutil.move(folder / "llama-dense.gguf", self.folder / "x.gguf"))
        kept = folder / "kept.gguf"
        convert = ["convert", self.source, "--type", "q8_0"]
        assert cli(*convert, "--keep-weights", "-o", kept).returncode == 0
        self.commands = {
            "x-flp.gguf": convert,
            "x_firstlayer.gguf": [*convert, "--sidecar"],
            "y.gguf": ["revert", kept, "-o", self.folder / "y.gguf"],
            "parts": [*convert, "--split-max-size", "1M", "-o", self.folder / "z.gguf"],
        }
        self.before, self.whole = self.source.read_bytes(), dict[str, dict[str, bytes]]()
        for output, command in self.commands.items():
            assert cli(*command).returncode == 0
            self.whole[output] = self.outputs()
            self.clear()

    @cached_property
    def library(self) -> Path:
        return shim(self.folder.parent)

    def outputs(self) -> dict[str, bytes]:
        """The files in the folder beside the source."""
        return {path.name: path.read_bytes() for path in self.folder.glob("[!.]*") if path != self.source}

    def kept(self) -> dict[str, bytes]:
        """What could not be put back, as a sentence tells."""
        return {path.stem: path.read_bytes() for path in self.folder.glob(".*/*.old")}

    def replaced(self, output: str) -> dict[str, bytes]:
        """Files that `--force` replaces, which are written."""
        for name in self.whole[output]:
            (self.folder / name).write_bytes(b"precious")
        return dict.fromkeys(self.whole[output], b"precious")

    def clear(self) -> None:
        for name in self.outputs():
            (self.folder / name).unlink()

    def attack(self, output: str, function: str, n: int, error: int, replace: bool) -> tuple[bool, str]:
        """Run a command whose n-th call of a function fails, and those after it. Returns whether one did, and what is wrong."""
        fired = self.folder.parent / "fired"
        old = self.replaced(output) if replace else {}
        environment = os.environ | {
            **preload(self.library),
            "FAULT": f"{function}:{n}:{error}",
            "FAULT_FOLDER": str(self.folder),
            "FAULT_FIRED": str(fired),
        }
        done = cli(*self.commands[output], *["--force"] * replace, env=environment)
        has_fired = fired.exists()
        fired.unlink(missing_ok=True)

        wrong = []
        found, kept = self.outputs(), self.kept()
        if kept and "could not be put back" not in done.stderr:
            wrong.append("nothing is said about what was taken away")
        if found | kept not in (self.whole[output], old):
            wrong.append("the output is neither as before nor whole")
        if self.source.read_bytes() != self.before:
            wrong.append("the source changed")
        if done.returncode not in (0, 1) or "Traceback" in done.stderr:
            wrong.append(f"exit code {done.returncode}: {done.stderr[-300:]}")
        if done.returncode == 1 and not done.stderr.splitlines()[-1].startswith("gguf-firstlayer: "):
            wrong.append(f"no sentence: {done.stderr[-300:]}")
        if done.returncode == 0 and found != self.whole[output]:
            wrong.append("it says that it succeeded")
        self.clear()
        for mark in self.folder.glob(".*/kept"):
            shutil.rmtree(mark.parent)
        whole = {*self.whole[output], self.source.name}
        if cli(*self.commands[output]).returncode != 0 or set(os.listdir(self.folder)) != whole:
            wrong.append(f"the next run leaves {sorted(os.listdir(self.folder))}")
        self.clear()
        return has_fired, "; ".join(wrong)


def main() -> int:
    """Attack every call of every function. Returns how many attacks found something."""
    n_wrong, n_faults = 0, dict.fromkeys(FAULTS, 0)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        for output in bench.commands:
            for function, errors in FAULTS.items():
                for error in errors:
                    for replace in (False, True):
                        n, has_fired = 1, True
                        while has_fired:
                            has_fired, wrong = bench.attack(output, function, n, error, replace)
                            n_faults[function] += has_fired
                            n, n_wrong = n + 1, n_wrong + bool(wrong)
                            if wrong:
                                print(f"{output}, {function} {n - 1}, {os.strerror(error)}, {replace=}: {wrong}", flush=True)
    n_faults["link"] += n_faults.pop("linkat")  # Python calls the one or the other
    never = [function for function, n in n_faults.items() if n == 0]
    print(f"{sum(n_faults.values())} faults, {n_wrong} wrong; calls that were never made: {never}")
    return n_wrong + len(never)


if __name__ == "__main__":
    sys.exit(bool(main()))
