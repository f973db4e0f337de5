"""Command line: `python -m gguf_firstlayer VERB`, `gguf-firstlayer VERB`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib import import_module

from gguf_firstlayer.errors import FirstLayerError

# verb, which is a module of this package, and an example
VERBS = {
    "plan": "gguf-firstlayer plan model.gguf",
    "convert": "gguf-firstlayer convert model.gguf",
    "verify": "gguf-firstlayer verify model.gguf model-flp.gguf --text wiki.test.raw",
    "bench": "gguf-firstlayer bench model.gguf model-flp.gguf --batch 1,512 --context 0,4096",
    "inspect": "gguf-firstlayer inspect model-flp.gguf",
    "paths": "gguf-firstlayer paths --json",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 1 for an error that the message explains (verify: 2), 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="gguf-firstlayer", description="First-layer precompute for GGUF models.")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, example in VERBS.items():
        module = import_module(f"gguf_firstlayer.{name}")
        summary = (module.__doc__ or "").split(": ", 1)[1]
        verb = subparsers.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
        module.add_arguments(verb)
        verb.set_defaults(run=module.main, failure=getattr(module, "FAILURE", 1))
    args = parser.parse_args(argv)

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
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
    return int(args.failure)


if __name__ == "__main__":
    sys.exit(main())
