"""A folder with a model and with modules and programs that must not run; tests/test_cli.py has libraries."""

from pathlib import Path

NAMES = ["numpy", "tqdm", "gguf", "sentencepiece", "yaml", "shtab", "pickle", "subprocess", "argparse", "logging"]
MODEL = "source"
EXPECTED = {"load": "", "plan": "", "convert": ""}


def forge(model: Path, output: Path) -> None:
    output.write_bytes(model.read_bytes())
    executed = output.with_name("executed")
    for name in NAMES:
        output.with_name(f"{name}.py").write_text(f"open({str(executed)!r}, 'a').write({name!r})")
    for name in ("gguf-firstlayer", "python", "python3", "git", "llama-gguf-split", "llama-completion"):
        program = output.with_name(name)
        program.write_text(f"#!/bin/sh\necho {name} >> '{executed}'\n")
        program.chmod(0o755)
