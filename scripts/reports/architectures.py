"""What conversion does to each architecture: writes docs/architectures.md."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support.builds import EXACT_FROM, ROOT, compare
from support.models import convert, write_archs

from gguf_firstlayer import FirstLayerError

F32 = 0  # enum ggml_type
PLM = "plm-dense"
# whose output changes from run to run
RANDOM = {"eagle3-dense"}
DOC = ROOT / "docs" / "architectures.md"

HEAD = Path(__file__).with_name("architectures.md").read_text(encoding="utf-8")


@dataclass
class Row:
    """A model's row in the table; with a `reason` if it cannot be converted."""

    name: str
    sites: str = ""
    eliminated: str = ""
    exactness: str = ""
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"| {self.name} | none: {self.reason} | | |"
        return f"| {self.name} | {self.sites} | {self.eliminated} | {self.exactness} |"


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Median over the tokens of the RMS difference: in a mixture of experts, rounding that changes a route has no bound."""
    square = np.square(a.astype(np.float64) - b)
    return float(np.median(np.sqrt(square.mean(axis=1))))


def differences(
    source: Path, converted: Path, batches: list[int], flash: int = 0, n_sequences: int = 1, graphs: tuple[int, ...] = (0, 1)
) -> dict[int, float]:
    """Largest difference of the outputs per batch size, after checking the exactness rule: outputs equal the stock library's
    bit for bit in batches of the last size, for which it uses the kernels that compute the rows; in others, they differ by no
    more than the stock library's own outputs do between batch sizes, within sampling noise. That is less with more sequences,
    as the rounding of a sequence's first tokens reaches all others. Also checks operations, in graphs without flash attention
    (0) and with it (1).
    """
    job = {"run": "outputs", "batches": [*batches, "parallel"], "flash_attn": flash}
    jobs = [job | {"tokens": {"count": 100, "seed": 1 + i}} for i in range(n_sequences)]
    # llama.cpp cannot build plm's graph with flash attention
    looks = [
        {"run": "graph", "tokens": {"count": 5, "seed": 2}, "size": 4, "flash_attn": kind}
        for kind in graphs
        if source.stem != PLM
    ]
    results = compare(source, converted, *jobs, *looks)
    outputs, nodes = results[:n_sequences], results[n_sequences:]
    sizes = [size for size, values in outputs[0][0].items() if isinstance(values, np.ndarray)]
    stock, ours = ({size: np.concatenate([pair[i][size] for pair in outputs]) for size in sizes} for i in range(2))
    assert np.isfinite(stock[batches[0]]).all(), "the model's output is not finite"
    assert np.unique(stock[batches[0]], axis=0).shape[0] > 50, "the output hardly depends on the tokens, so it shows nothing"

    assert np.array_equal(stock[batches[-1]], ours[batches[-1]])
    others = [stock["parallel"]] if "parallel" in stock else [stock[size] for size in batches]
    own = max(distance(stock[1], other) for other in others)
    for size in batches:
        assert distance(stock[size], ours[size]) <= 1.5 * own, size
    for stock_nodes, our_nodes in nodes:
        check_operations(stock_nodes, our_nodes)
    return {size: float(np.abs(stock[size] - ours[size]).max()) for size in batches}


def check_operations(stock: list[Any], ours: list[Any]) -> None:
    """Check that a rewritten graph has only the stock graph's operations with the same types, and lookups in tables, views and
    copies of F32, so that every device that can run the one can run the other.
    """
    known = {(operation, types) for operation, _, _, types, _ in stock} | {("CONT", (F32, F32))}
    for operation, name, operands, types, _ in ours:
        is_lookup = operation == "GET_ROWS" and operands[0].startswith("firstlayer.")
        assert is_lookup or operation == "VIEW" or (operation, types) in known, (operation, name, operands, types)


def examine(source: Path, folder: Path) -> Row:
    """Convert a model and compare it with its source."""
    try:
        result = convert(source, folder / source.name, type="f32")
    except FirstLayerError as err:
        reason = str(err)
        assert "has nothing to precompute: " in reason, reason
        return Row(source.stem, reason=reason.partition("has nothing to precompute: ")[2])

    try:
        difference = differences(source, result.output, [1, 2, 7, 64])
        assert not any(change for size, change in difference.items() if size >= EXACT_FROM)
    finally:
        result.output.unlink()

    def names(weights: Iterable[str]) -> str:
        return ", ".join(name.removeprefix("blk.0.") for name in sorted(name.removesuffix(".weight") for name in weights))

    kept = f"not read for tokens: {names(result.spares)}" if result.spares else ""
    return Row(
        source.stem,
        ", ".join(f"{site.name.strip()} {site.width}" for site in result.sites),
        "; ".join(filter(None, (names(weight.name for weight in result.elided), kept))),
        "from 2" if difference[1] else "all batches",
    )


def only_embeds(name: str) -> bool:
    """Whether a model gives no logits."""
    return "bert" in name or name.startswith(("gemma-embedding", "llama-embed", "t5encoder"))


def read() -> dict[str, str]:
    """The rows of docs/architectures.md by name of the model."""
    rows = [line for line in DOC.read_text().splitlines() if line.startswith("| ")][1:]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        models = Path(name, "models")
        models.mkdir()
        write_archs(models)
        rows = [examine(path, Path(name)) for path in sorted(models.glob("*.gguf"))]
    commit = re.search(r"LLAMA_CPP_COMMIT +(\w+)", (ROOT / "cmake" / "llama-cpp.cmake").read_text())[1]
    DOC.write_text(HEAD.format(commit=commit) + "".join(f"{row}\n" for row in rows))
