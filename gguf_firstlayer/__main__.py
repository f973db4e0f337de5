"""Command line: `python -m gguf_firstlayer VERB`, `gguf-firstlayer VERB`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import shtab

from gguf_firstlayer import __version__
from gguf_firstlayer.ask import tell_of_retries
from gguf_firstlayer.errors import Caller, FirstLayerError, UsageError
from gguf_firstlayer.hub import model_name
from gguf_firstlayer.installation import build
from gguf_firstlayer.output import Appeared
from gguf_firstlayer.start import STOPPING, interrupt
from gguf_firstlayer.text import Printable, log, printable

# verb (a module of this package) -> an example call
VERBS = {
    "plan": "gguf-firstlayer plan model.gguf",
    "convert": "gguf-firstlayer convert model.gguf",
    "verify": "gguf-firstlayer verify model.gguf model-flp.gguf --text wiki.test.raw",
    "bench": "gguf-firstlayer bench model.gguf model-flp.gguf --batch 1,512 --context 0,4096",
    "revert": "gguf-firstlayer revert model-flp.gguf --source model.gguf -o back.gguf",
    "inspect": "gguf-firstlayer inspect model-flp.gguf",
    "card": "gguf-firstlayer card model-flp.gguf --base-model user/repo > card.md",
    "run": "gguf-firstlayer run main -m model-flp.gguf -p Hello",
    "paths": "gguf-firstlayer paths --json",
}


class _Version(argparse.Action):
    """Prints the versions of the package and of llama.cpp, and looks them up only when asked."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> None:
        print(f"gguf-firstlayer {__version__}, llama.cpp {build().commit}")
        sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gguf-firstlayer", description="First-layer precompute, and demand, for GGUF models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions of this program and of llama.cpp")
    shtab.add_argument_to(parser, "--print-completion", help="print a shell completion script, and exit")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, example in VERBS.items():
        module = import_module(f"gguf_firstlayer.{name}")
        summary = (module.__doc__ or "").split(": ", 1)[1]
        verb = subparsers.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
        module.add_arguments(verb)
        for action in verb._actions:
            if action.type in (Path, model_name):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            if action.type is model_name:
                verb.epilog = f"example: {example}; a model may also be hf:USER/REPO[:QUANTIZATION], or a URL"
        verb.set_defaults(
            run=module.main, failure=getattr(module, "FAILURE", 1), interrupted=getattr(module, "INTERRUPTED", "")
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 1 for an error that the message explains (verify: 2), 2 for wrong usage."""
    Caller.is_command_line, Appeared.last = True, None
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored in a background job, or under nohup
            signal.signal(number, interrupt)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(Printable())
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        tell_of_retries()
    logging.raiseExceptions = False  # the terminal may be closed
    failure, interrupted = 1, ""
    try:
        parser = _parser()
        if not (sys.argv[1:] if argv is None else argv):
            parser.print_help(sys.stderr)  # which verbs there are, not only that there must be one
            return 2
        args = parser.parse_args(argv)
        failure, interrupted = args.failure, args.interrupted
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except UsageError as err:
        return _fail(str(err), 2)
    except FirstLayerError as err:
        return _fail(str(err), failure)
    except KeyboardInterrupt:
        return _fail(f"interrupted, {Appeared.last} is complete" if Appeared.last else f"interrupted{interrupted}", failure)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has closed the pipe
        return failure
    except MemoryError:
        return _fail("out of memory; close other programs, or use a smaller model", failure)
    except OSError as err:
        where = f"{err.filename}: " if err.filename else ""
        return _fail(f"{where}{err.strerror or err}", failure)


def _fail(message: str, code: int) -> int:
    with suppress(OSError):  # the terminal may be closed
        print(printable(f"gguf-firstlayer: {message}"), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
