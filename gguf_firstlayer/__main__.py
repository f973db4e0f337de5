"""Command line: `python -m gguf_firstlayer VERB`, `gguf-firstlayer VERB`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import shtab

from gguf_firstlayer import __version__
from gguf_firstlayer.errors import FirstLayerError
from gguf_firstlayer.paths import build

# verb, which is a module of this package, and an example
VERBS = {
    "plan": "gguf-firstlayer plan model.gguf",
    "convert": "gguf-firstlayer convert model.gguf",
    "verify": "gguf-firstlayer verify model.gguf model-flp.gguf --text wiki.test.raw",
    "bench": "gguf-firstlayer bench model.gguf model-flp.gguf --batch 1,512 --context 0,4096",
    "revert": "gguf-firstlayer revert model-flp.gguf -o model.gguf",
    "inspect": "gguf-firstlayer inspect model-flp.gguf",
    "run": "gguf-firstlayer run main -m model-flp.gguf -p Hello",
    "paths": "gguf-firstlayer paths --json",
}


class _Version(argparse.Action):
    """Prints the versions of the package and of llama.cpp, which are looked up only if asked for."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> None:
        print(f"gguf-firstlayer {__version__}, llama.cpp {build().commit}")
        sys.exit(0)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 1 for an error that the message explains (verify: 2), 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="gguf-firstlayer", description="First-layer precompute for GGUF models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions of this program and of llama.cpp")
    shtab.add_argument_to(parser, "--print-completion", help="print a script for the completion of a shell, and exit")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, example in VERBS.items():
        module = import_module(f"gguf_firstlayer.{name}")
        summary = (module.__doc__ or "").split(": ", 1)[1]
        verb = subparsers.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
        module.add_arguments(verb)
        for action in verb._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        verb.set_defaults(run=module.main, failure=getattr(module, "FAILURE", 1))

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    failure = 1
    try:
        args = parser.parse_args(argv)
        failure = int(args.failure)
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except FirstLayerError as err:
        print(f"gguf-firstlayer: {err}", file=sys.stderr)
    except KeyboardInterrupt:
        print("gguf-firstlayer: interrupted, nothing was written", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever reads it has seen enough
    except OSError as err:
        print(f"gguf-firstlayer: {err}", file=sys.stderr)
    except MemoryError:
        print("gguf-firstlayer: out of memory, nothing was written", file=sys.stderr)
    return failure


if __name__ == "__main__":
    sys.exit(main())
