"""How much memory this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def memory_limit(process: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that this process may use: those of the machine, or of its container; None where that is unknown.

    Args:
        process: Linux's list of the control groups that the process is in
        groups: where control groups are mounted
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    try:
        lines = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:  # not Linux
        lines = []
    for _, controllers, path in lines:
        if controllers == "":  # version 2
            root, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                value = (folder / name).read_text().strip()
            except OSError:
                value = "max"
            limits += [int(value)] if value.isdecimal() else []
            if folder == root:
                break
    return min(limits, default=None)
