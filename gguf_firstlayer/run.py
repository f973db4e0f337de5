"""`run`: run a tool of the patched llama.cpp, like main or server, with the tool's own options.

Models may be on the Hub or behind URLs, as for every verb. llama.cpp's own downloads need a build with OpenSSL; in others, the
model of `-hf` is downloaded here, to the same cache.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys

from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.hub import HUB, download_with_sidecar, is_remote, local
from gguf_firstlayer.installation import TOOLS, build, paths

# options of the tools that take a model
_MODEL = ("-m", "--model", "-md", "--model-draft", "--spec-draft-model", "--firstlayer")
# and those that take a file that is no model, which a repository's name does not stand for
_FILE = ("-mm", "--mmproj", "--lora")
# and those that take a repository, from which the tools download themselves
_REPOSITORY = ("-hf", "-hfr", "--hf-repo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    parser.add_argument("tool", choices=list(TOOLS), metavar="TOOL", help=", ".join(TOOLS))
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of the tool; --help lists them")


def main(args: argparse.Namespace) -> int:
    """Run `run` from the command line: become the tool."""
    path = paths().get(args.tool)
    if path is None:
        raise FirstLayerError(f"{TOOLS[args.tool]} was not built; build the target {TOOLS[args.tool]} of llama.cpp")
    pairs = list(zip(["", *args.options], args.options, strict=False))
    options = [
        str(local(value)) if is_remote(value) and (before in _MODEL or (before in _FILE and value.endswith(".gguf"))) else value
        for before, value in pairs
    ]
    repositories = [value for before, value in pairs if before in _REPOSITORY]
    if repositories and not build().https:
        for repository in repositories:
            download_with_sidecar(f"{HUB}{repository}")
        options.append("--offline")
    command = [str(path), *options]
    if sys.platform == "win32":  # it has no exec that the shell would wait for
        return subprocess.call(command)
    for name in ("SIGPIPE", "SIGXFSZ"):  # which Python ignores, and the tool would, too
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.execv(path, command)
