"""Trains a small language model with parallel blocks, the kind that gains most from tables, and writes it as GGUF.

Run it as `.venv/bin/python scripts/train_example.py`. It takes an hour on two cores (`--minutes`). The model learns from
manuals and licences that are on every Debian-like system with Python: the language reference that `help()` shows, the
documentation of the standard library, and /usr/share/common-licenses. What it writes reads like these, and makes as much
sense as 5 million parameters allow.

The blocks are GPT-NeoX's: attention and FFN both read the block's input, and positions enter through RoPE. The file takes 6 MB.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import pydoc_data.topics
import sys
import sysconfig
import time
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.nn import functional

LAYERS, WIDTH, HEADS, CONTEXT, VOCABULARY = 4, 320, 5, 256, 1024
BATCH, RATE, WARMUP = 8, 1.5e-3, 100
END = "<|endoftext|>"


def documents() -> list[str]:
    """The texts, in a fixed order."""
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    texts += [
        path.read_text(errors="replace") for path in sorted(Path("/usr/share/common-licenses").glob("*")) if path.is_file()
    ]
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"test", "tests", "site-packages", "idle_test", "lib2to3"} & set(path.parts):
            continue
        try:
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
        texts += [text for text in found if len(text) > 80]
    return texts


class Block(nn.Module):
    """A parallel block of GPT-NeoX; names are those of GGUF."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.ffn_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn_qkv, self.attn_output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ffn_up, self.ffn_down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The output for F32 [batch, tokens, WIDTH], with the cosines and sines of RoPE, F32 [tokens, size of a head]."""
        n_batch, n, _ = x.shape
        heads = self.attn_qkv(self.attn_norm(x)).view(n_batch, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)

        def rotate(of: torch.Tensor) -> torch.Tensor:
            first, second = of.chunk(2, dim=-1)
            return of * cos + torch.cat((-second, first), dim=-1) * sin

        attention = functional.scaled_dot_product_attention(rotate(heads[0]), rotate(heads[1]), heads[2], is_causal=True)
        attended = self.attn_output(attention.transpose(1, 2).reshape(n_batch, n, WIDTH))
        return x + attended + self.ffn_down(functional.gelu(self.ffn_up(self.ffn_norm(x)), approximate="tanh"))


class Model(nn.Module):
    """The whole model; names are those of GGUF."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embd, self.blk = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(Block() for _ in range(LAYERS))
        self.output_norm, self.output = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                deep = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * LAYERS if deep else 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits F32 [batch, tokens, VOCABULARY] of token ids [batch, tokens]."""
        size = WIDTH // HEADS
        angles = torch.outer(torch.arange(tokens.shape[1]), 10000.0 ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)
        x, cos, sin = self.token_embd(tokens), angles.cos(), angles.sin()
        for block in self.blk:
            x = block(x, cos, sin)
        return self.output(self.output_norm(x))


def train(tokens: torch.Tensor, minutes: float) -> Model:
    """Train for some minutes; the last hundredth of the tokens is held out."""
    model = Model()
    split = len(tokens) * 99 // 100
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    started, step, shown = time.monotonic(), 0, 0.0
    while (passed := (time.monotonic() - started) / 60) < minutes:
        rate = RATE * min(1, (step + 1) / WARMUP) * (0.05 + 0.95 * (1 + math.cos(math.pi * passed / minutes)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        starts = torch.randint(split - CONTEXT - 1, (BATCH,))
        batch = torch.stack([tokens[start : start + CONTEXT + 1] for start in starts])
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if passed - shown > minutes / 50:
            shown = passed
            print(
                f"{passed:.1f} minutes, {step * BATCH * CONTEXT:,} tokens, loss {loss.item():.3f}", file=sys.stderr, flush=True
            )
    with torch.no_grad():
        held = tokens[split:][: (len(tokens) - split) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
        loss = functional.cross_entropy(model(held[:, :-1]).flatten(0, 1), held[:, 1:].flatten())
    print(f"held-out text: loss {loss.item():.3f}, perplexity {loss.exp().item():.1f}", file=sys.stderr)
    return model


def write(model: Model, tokenizer: ByteLevelBPETokenizer, path: Path) -> None:
    """Write the model as GGUF, matrices in Q8_0."""
    writer = gguf.GGUFWriter(path, "gptneox")
    writer.add_name("Manuals and licences")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_parallel_residual(True)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    end = tokenizer.token_to_id(END)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([gguf.TokenType.CONTROL if i == end else gguf.TokenType.NORMAL for _, i in vocabulary])
    writer.add_token_merges(merges(tokenizer))
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(True)
    for name, weight in model.named_parameters():
        values = weight.detach().numpy()
        if values.ndim > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merges(tokenizer: ByteLevelBPETokenizer) -> list[str]:
    """Pairs of tokens that become one, in the order of their rank."""
    found = json.loads(tokenizer.to_str())["model"]["merges"]
    return [" ".join(pair) if isinstance(pair, list) else pair for pair in found]


def main() -> None:
    """Train, and write the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("models/manuals.gguf"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    texts = documents()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    end = tokenizer.token_to_id(END)
    order = torch.randperm(len(texts)).tolist()
    tokens = torch.tensor([token for i in order for token in [end, *tokenizer.encode(texts[i]).ids]])
    print(f"{len(texts):,} texts, {sum(map(len, texts)):,} characters, {len(tokens):,} tokens", file=sys.stderr)
    write(train(tokens, args.minutes), tokenizer, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
