"""docs/json.md, written from the docstrings of the results: `scripts/docs json`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path

import gguf_firstlayer as package
from gguf_firstlayer import FirstLayerError  # noqa: F401 (imports all modules)

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "json.md"
RESULTS = {
    "`plan`": package.Plan,
    "`plan` of several models": package.Plans,
    "`convert`": package.Conversion,
    "`verify`": package.Verification,
    "`bench`": package.Bench,
    "`revert`": package.Reversion,
    "`inspect`": package.Inspection,
}
INTRODUCTION = Path(__file__).with_name("json_schema.md").read_text(encoding="utf-8")


def meanings(kind: type) -> dict[str, str]:
    """What the docstring says about each attribute."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}(\w[\w, ]*): (.+(?:\n {8}.+)*)", section, re.MULTILINE):
        for name in names.split(", "):
            found[name] = re.sub(r"\bNone\b", "null", re.sub(r"\s+", " ", text))
    return found


def type_text(kind: object) -> tuple[str, list[type]]:
    """A type in terms of JSON, and the classes in it."""
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if arguments:
        inner = [type_text(argument) for argument in arguments if argument is not ...]
        classes = [each for _, found in inner for each in found]
        texts = list(dict.fromkeys(text for text, _ in inner))
        if origin in (list, tuple):
            return f"array of {' or '.join(texts)}", classes
        if origin is dict:
            return f"object of {texts[-1]}", classes
        return " or ".join(texts), classes
    if dataclasses.is_dataclass(kind):
        return f"[{kind.__name__}](#{kind.__name__.lower()})", [typing.cast(type, kind)]
    names = {bool: "boolean", int: "integer", float: "number", type(None): "null"}
    return names.get(typing.cast(type, kind), "string"), []


def page() -> str:
    parts, done = [INTRODUCTION], set()
    queue: list[tuple[str, type]] = [(f"{call}: {kind.__name__}", kind) for call, kind in RESULTS.items()]
    while queue:
        title, kind = queue.pop(0)
        if kind in done:
            continue
        done.add(kind)
        hints = typing.get_type_hints(kind, vars(sys.modules[kind.__module__]))
        texts, lines = meanings(kind), []
        for field in dataclasses.fields(kind):
            text, classes = type_text(hints[field.name])
            text += " or null" if field.default != field.default else ""  # not a number where it is not measured
            lines.append(f"| `{field.name}` | {text} | {texts[field.name]} |")
            queue += [(each.__name__, each) for each in classes]
        table = "\n".join(["| key | type | content |", "|---|---|---|", *lines])
        summary = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
        parts.append(f'<a id="{kind.__name__.lower()}"></a>\n\n## {title}\n\n{summary}\n\n{table}\n')
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
