"""What tables of only the most used tokens would cost, and how often they would be hit: docs/hot-rows.md."""

from __future__ import annotations

import os
import pydoc_data.topics
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gains import headers, plan_of
from support.builds import PATCHED, ROOT

os.environ["LLAMA_CPP_LIB_PATH"] = str(PATCHED)
import llama_cpp
from support import worker

from gguf_firstlayer.estimate import distinct_tokens
from gguf_firstlayer.runtime import Analysis

DOC = ROOT / "docs" / "hot-rows.md"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = (1024, 4096, 8192, 16384, 32768)
BATCHES = (1, 8, 32, 128, 512)
TEXT_BYTES = 2_000_000
EXAMPLES = ("command-r-35b", "smollm2-135m", "gemma-3-270m", "llama-3.2-1b", "qwen3.5-0.8b", "llama-68m", "phi-2")

PAGE = Path(__file__).with_name("hot_rows.md").read_text(encoding="utf-8")


def texts() -> dict[str, str]:
    """Texts by their kind."""

    def read(folder: Path, pattern: str) -> str:
        found = sorted(
            path for path in folder.rglob(pattern) if "test" not in path.as_posix() and "unicode-data" not in path.name
        )
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in found)

    sources = ROOT / "build" / "llama.cpp"
    return {
        "Python's library": read(Path(sysconfig.get_path("stdlib")), "[a-p]*.py"),
        "llama.cpp's sources": read(sources / "src", "*.cpp"),
        "llama.cpp's documents": read(sources, "*.md"),
        "Python's manual": "\n".join(pydoc_data.topics.topics.values()),
    }


def batches(tokens: np.ndarray, size: int) -> np.ndarray:
    """Consecutive tokens, [number of batches, size]."""
    return tokens[: len(tokens) // size * size].reshape(-1, size)


def hit(tokens: np.ndarray, hot: np.ndarray, size: int) -> float:
    """Share of batches of consecutive tokens in which every token is hot."""
    return float(np.isin(batches(tokens, size), hot).all(axis=1).mean())


def tokenized() -> tuple[dict[str, np.ndarray], int]:
    """Token ids of the texts by their kind, and the size of the vocabulary."""
    with Analysis(MODEL) as analysis:
        return {kind: analysis.tokenize(text[:TEXT_BYTES]) for kind, text in texts().items()}, analysis.n_vocab


def distinct(kinds: dict[str, np.ndarray], n_vocab: int) -> list[str]:
    """Rows of the table of distinct tokens."""
    rows = []
    for n in (1024, 4096, 16384, 65536):
        counts = [
            np.mean([len(np.unique(part)) for part in tokens[: len(tokens) // n * n].reshape(-1, n)])
            for tokens in kinds.values()
        ]
        cells = " | ".join(f"{count:,.0f}" for count in counts)
        rows.append(f"| {n:,} | {cells} | {distinct_tokens(n, n_vocab):,.0f} |")
    return rows


def hits(kinds: dict[str, np.ndarray], n_vocab: int) -> dict[str, dict[int, dict[int, float]]]:
    """Mean shares of batches that are all hot, by ranking, number of rows and batch size."""

    def held_out(tokens: np.ndarray) -> np.ndarray:
        return tokens[len(tokens) // 2 :]

    def ranked(*parts: np.ndarray) -> np.ndarray:
        counts = np.bincount(np.concatenate(parts), minlength=n_vocab)
        return np.argsort(-counts, kind="stable")

    rankings: dict[str, Callable[[str], np.ndarray]] = {
        "the same text": lambda kind: ranked(kinds[kind][: len(kinds[kind]) // 2]),
        "the other texts": lambda kind: ranked(*(tokens for other, tokens in kinds.items() if other != kind)),
        "token id": lambda _: np.arange(n_vocab),
    }
    result: dict[str, dict[int, dict[int, float]]] = {}
    for name, ranking in rankings.items():
        orders = {kind: ranking(kind) for kind in kinds}
        result[name] = {
            n: {
                size: float(
                    np.mean([hit(tokens[len(tokens) // 2 :], orders[kind][:n], size) for kind, tokens in kinds.items()])
                )
                for size in BATCHES
            }
            for n in ROWS
        }
    return result


def rebuild(pairs: int) -> str:
    """Time of decoding with a new graph for each token, relative to decoding with a reused one."""
    model = worker.Model(str(MODEL))
    contexts = []
    for disabled in ("0", "1"):
        os.environ["LLAMA_GRAPH_REUSE_DISABLE"] = disabled
        contexts.append(model.context())
    tokens = model.tokens({"count": 24, "seed": 0})

    def block(context: object) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        for i, token in enumerate(tokens):
            worker.decode(context, [token], i)
        return time.perf_counter() - start

    order = random.Random(0)
    ratios = []
    for i in range(pairs + 2):
        times = {}
        for which in order.sample((0, 1), 2):
            times[which] = block(contexts[which])
        if i >= 2:  # warm
            ratios.append(times[1] / times[0])
    draws = np.random.default_rng(0).choice(ratios, (2000, pairs))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}]"


def worth(n: int, share: float) -> list[str]:
    """Rows of the table of models."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in headers(Path(folder)):
            if path.stem in EXAMPLES:
                plan, _ = plan_of(path)
                n_vocab = plan.values_stored // sum(site.width for site in plan.sites)
                some = plan.table_bytes["q8_0"] * n / n_vocab
                bound = 1 / (1 - share * (1 - 1 / plan.decode_bound))
                rows.append(
                    f"| {path.stem} | {some / plan.file_bytes:+.1%} | {bound:.4f} |"
                    f" {plan.file_change / plan.file_bytes:+.1%} | {plan.decode_bound:.4f} |"
                )
    return rows


def main() -> None:
    """Measure, and write the page."""
    kinds, n_vocab = tokenized()
    shares = hits(kinds, n_vocab)
    n, pairs = 8192, 40
    share = shares["the other texts"][n][1]
    DOC.write_text(
        PAGE.format(
            texts=", ".join(kinds),
            formula="0.807 n^0.639 V^0.148",
            kinds=" | ".join(kinds),
            kinds_dashes="--:|" * len(kinds),
            distinct="\n".join(distinct(kinds, n_vocab)),
            batches=" | ".join(f"{size} tokens" if size > 1 else "1 token" for size in BATCHES),
            dashes="--:|" * len(BATCHES),
            hits="\n".join(
                f"| {name} | {rows:,} | " + " | ".join(f"{value:.1%}" for value in row.values()) + " |"
                for name, table in shares.items()
                for rows, row in table.items()
            ),
            n=f"{n:,}",
            share=share,
            worth="\n".join(worth(n, share)),
            rebuild=rebuild(pairs),
            pairs=pairs,
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    sys.exit(main())
