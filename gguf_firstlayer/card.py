"""`card`: the model card of a converted file or a sidecar, for its page on the Hub."""

from __future__ import annotations

import argparse
import re
import shlex
import sys

from gguf_firstlayer import file_format
from gguf_firstlayer.errors import FirstLayerError, UsageError, option
from gguf_firstlayer.hub import ModelName, local, model_name
from gguf_firstlayer.source import Source
from gguf_firstlayer.text import count, printable, size_text

# keys of a model that hold the address of the one that it was made from, the nearest first (gguf.constants.Keys.General)
_ADDRESSES = ("general.source.repo_url", "general.source.url", "general.base_model.0.repo_url")
_REPOSITORY = r"[\w.-]+/[\w.-]+"


def card(path: ModelName, *, base_model: str | None = None) -> str:
    """The model card (README.md) of a converted file or a sidecar, in Markdown.

    It says what the file is, its sizes, its effect as `convert` measured it, and how to run it.

    Args:
        path: the file, or what `hub.local` takes; of a split one, the first part
        base_model: repository on the Hub of the source, like `user/repo`; by default the one that the file was downloaded from,
            or that its keys name

    Raises:
        UsageError: this is no name of a repository.
        FirstLayerError: the file cannot be read, is not converted, or does not tell where its source is.
    """
    from huggingface_hub import ModelCardData

    if base_model is not None and not re.fullmatch(_REPOSITORY, base_model):
        raise UsageError(f"'{base_model}' is no repository on the Hub; give one like user/repo")
    file = Source(local(path))
    sites, tables, elided = file_format.read(file)
    if not sites:
        raise FirstLayerError(f"{file.path} is not converted; give a file that convert wrote")
    base = base_model or _base(file)
    if base is None:
        raise FirstLayerError(f"{file.path} does not tell where its source is; give {option('base_model', 'user/repo')}")
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized",
        library_name="gguf",
        license=_word(file, "general.license"),
        license_link=_word(file, "general.license.link"),
        tags=["gguf", "llama.cpp", "gguf-firstlayer"],
    )
    name = _word(file, "general.name") or file.stem
    page = f"---\n{data.to_yaml()}\n---\n\n{_text(name, base, file, sites, tables, elided)}"
    # text of a file becomes text of a page, not its markup
    return re.sub(r"[<>]", "", "\n".join(map(printable, page.split("\n"))))


def _word(file: Source, key: str) -> str | None:
    """The first line of a text among the keys of a file."""
    value = file.value(key)
    return value.strip().partition("\n")[0] if isinstance(value, str) and value.strip() else None


def _base(file: Source) -> str | None:
    """The repository of a file's source, from its place in the Hub's cache, or from its keys."""
    is_own = file.path.is_symlink() and not file_format.is_sidecar(file)  # it was itself downloaded from there
    for part in () if is_own else file.path.absolute().parts:
        if match := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return f"{match[1]}/{match[2]}"
    for key in _ADDRESSES:
        if match := re.match(rf"https://huggingface\.co/({_REPOSITORY})(/|$)", _word(file, key) or ""):
            return match[1]
    return None


def _text(
    name: str,
    base: str,
    file: Source,
    sites: list[file_format.StoredSite],
    tables: list[file_format.Table],
    elided: list[file_format.Elided],
) -> str:
    """The card below its metadata."""
    is_sidecar = file_format.is_sidecar(file)
    names = ", ".join(f"`{site.name}`" for site in sites)
    types = ", ".join(dict.fromkeys(tables[site.table].type.name.lower() for site in sites))
    what = "tables for the first layer" if is_sidecar else "with tables for its first layer"
    lines = [
        f"# {name}, {what}",
        "",
        f"What the first layer of [{base}](https://huggingface.co/{base}) computes from the token alone ({names}) is looked up"
        f" in {'this file' if is_sidecar else 'tables'} instead ([arXiv 2402.13388](https://arxiv.org/abs/2402.13388)). It was"
        " converted by gguf-firstlayer, and runs on its llama.cpp; others refuse it.",
        "",
        "| | |",
        "|---|--:|",
        f"| `{file.path.name}` | {size_text(file.bytes)} |",
        f"| tables in it ({types}) | {size_text(sum(table.bytes for table in tables))} |",
    ]
    origin = file_format.read_origin(file)
    if origin and not is_sidecar:
        lines.append(f"| its source | {size_text(sum(origin.sizes))} |")
    if elided:
        freed = size_text(sum(weight.bytes for weight in elided))
        left_out = f"that {'are' if len(elided) > 1 else 'is'} not loaded" if is_sidecar else "left out"
        lines.append(f"| {count(len(elided), 'weight')} {left_out} | {freed} |")
    return "\n".join([*lines, "", *_effect(file_format.read_measurement(file), types), "", *_usage(file, is_sidecar), ""])


def _effect(measured: file_format.Measurement | None, types: str) -> list[str]:
    """What tables change about the model's output."""
    if measured:
        return [
            f"Measured when it was converted, over {measured.tokens:,} tokens: a mean KL divergence of {measured.kld:.1e} nats"
            f" from the source, of which {measured.kld_tables:.1e} ± {measured.kld_tables_error:.1e} from the tables; the most"
            f" probable token is the same for {measured.top1:.1%} of them; perplexity {measured.perplexity_source:.3f}"
            f" without the tables, {measured.perplexity:.3f} with them."
        ]
    if types == "f32":
        return ["The tables are not rounded. `gguf-firstlayer verify` compares it with its source."]
    return ["Its effect was not measured when it was converted; `gguf-firstlayer verify` compares it with its source."]


def _usage(file: Source, is_sidecar: bool) -> list[str]:
    """How to run it."""
    if not is_sidecar:
        return ["```sh", f"gguf-firstlayer run server -m {shlex.quote(file.path.name)}", "```"]
    source, told = "SOURCE.gguf", "Run it with its source; of a split model, give the first part."
    if file.path.stem.endswith("_firstlayer"):
        told += " `-hf` takes both if they are in one repository, where this one is named after the other."
        source = f"{file.path.stem.removesuffix('_firstlayer')}.gguf"
    command = shlex.join(["gguf-firstlayer", "run", "server", "-m", source, "--firstlayer", file.path.name])
    return [told, "", "```sh", command, "```"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `card`."""
    parser.add_argument("path", type=model_name, metavar="FILE.gguf", help="a converted file, or a sidecar")
    parser.add_argument("--base-model", metavar="USER/REPO", help="where its source is; by default, as the file tells")


def main(args: argparse.Namespace) -> int:
    """Run `card` from the command line."""
    text = card(args.path, base_model=args.base_model)
    sys.stdout.buffer.write(text.encode(errors="surrogateescape"))  # a file, in UTF-8 whatever the terminal's encoding
    return 0
