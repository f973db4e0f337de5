"""The command line, as a user calls it."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

from support.builds import ROOT


def cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "gguf_firstlayer", *map(str, arguments)]
    return subprocess.run(command, **{"text": True, "capture_output": True, "cwd": ROOT, "check": False} | options)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence with which a run was refused; it may follow lines about what the run was going to do."""
    assert done.returncode in (1, 2), done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert [line for line in lines if re.match(r"gguf-firstlayer( \w+)?: ", line)] == lines[-1:], done.stderr
    return lines[-1]
