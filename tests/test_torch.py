"""An oracle that is independent of llama.cpp: the formulas in torch, from Hugging Face transformers."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from support.builds import PATCHED, ROOT, run
from support.models import convert
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

N_VOCAB = 320
HIDDEN = 64
HEADS = 4

# llama.cpp's own script, told which pre-tokenizer our toy vocabulary has: it only knows those of published models
SCRIPT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
script = sys.argv.pop(1) + "/convert_hf_to_gguf.py"
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def to_gguf(model, folder):
    """Save a model with a toy tokenizer, and convert it with llama.cpp's script."""
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"<{i}>" for i in range(N_VOCAB - len(alphabet) - 1)]
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab", *filler])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<0>", bos_token="<0>").save_pretrained(folder)

    output = folder / "model.gguf"
    llama_cpp = ROOT / "build" / "llama.cpp"
    command = [sys.executable, "-c", SCRIPT, str(llama_cpp), str(folder), "--outfile", str(output), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def columns(result, start):
    """The columns of the site whose recipe starts like this, [vocabulary, width]."""
    (site,) = [site for site in result.sites if site.recipe.startswith(start)]
    table = next(t for t in GGUFReader(result.output).tensors if t.name == result.tables[site.table].name)
    return table.data[:, site.column : site.column + site.width]


def rope_order(rows, n_heads):
    """Rows of a Q or K projection in the order that llama.cpp's rope expects: both halves of a head interleaved."""
    n, width = rows.shape
    return rows.reshape(n, n_heads, 2, width // n_heads // 2).swapaxes(2, 3).reshape(n, width)


def compare_logits(model, output):
    tokens = np.random.default_rng(5).integers(0, N_VOCAB, 40).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    job = {"run": "logits", "model": output, "tokens": tokens, "batches": [1, 40], "f32_cache": True}
    (ours,) = run(PATCHED, job)
    for logits in ours.values():
        np.testing.assert_allclose(logits, expected, atol=5e-3)
        assert np.array_equal(logits.argmax(axis=1), expected.argmax(axis=1))


def randomise(model):
    """Give norms and biases values that reveal mistakes; transformers initializes them to 1 and 0."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + ("weight" in name))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.mark.parametrize("heads_kv", [4, 2])
def test_llama(heads_kv, tmp_path):
    config = LlamaConfig(
        vocab_size=N_VOCAB, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=heads_kv, tie_word_embeddings=False, max_position_embeddings=128,
    )  # fmt: skip
    model = randomise(LlamaForCausalLM(config))
    result = convert(to_gguf(model, tmp_path), type="f32")

    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(torch.arange(N_VOCAB)))
        q, k, v = (getattr(layer.self_attn, f"{name}_proj")(x).numpy() for name in "qkv")
    np.testing.assert_allclose(columns(result, "mul_mat(blk.0.attn_q"), rope_order(q, HEADS), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(columns(result, "mul_mat(blk.0.attn_k"), rope_order(k, heads_kv), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(columns(result, "mul_mat(blk.0.attn_v"), v, atol=1e-5, rtol=1e-4)
    compare_logits(model, result.output)


def test_gptneox(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=N_VOCAB, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=2, num_attention_heads=HEADS,
        rotary_pct=0.25, use_parallel_residual=True, max_position_embeddings=128, hidden_act="gelu_new",
    )  # fmt: skip
    model = randomise(GPTNeoXForCausalLM(config))
    result = convert(to_gguf(model, tmp_path), type="f32")

    layer = model.gpt_neox.layers[0]
    with torch.no_grad():
        embedding = model.gpt_neox.embed_in(torch.arange(N_VOCAB))
        # heads of [q, k, v] in torch, all q before all k before all v in GGUF
        qkv = layer.attention.query_key_value(layer.input_layernorm(embedding)).reshape(N_VOCAB, HEADS, 3, HIDDEN // HEADS)
        qkv = qkv.transpose(1, 2).reshape(N_VOCAB, 3 * HIDDEN).numpy()
        ffn = layer.mlp(layer.post_attention_layernorm(embedding))
    np.testing.assert_allclose(columns(result, "add(mul_mat(blk.0.attn_qkv"), qkv, atol=1e-5, rtol=1e-4)

    # llama.cpp computes gelu with tanh and a table of F16 values, which is within 5e-3 of torch's
    (site,) = [site for site in result.sites if "ffn_down" in site.recipe]
    assert site.recipe.endswith("blk.0.ffn_down.bias), $1)"), "the skip belongs to the site"
    np.testing.assert_allclose(columns(result, site.recipe), (ffn + embedding).numpy(), atol=5e-3)

    assert {"blk.0.ffn_up.weight", "blk.0.ffn_down.weight"} <= {weight.name for weight in result.elided}
    compare_logits(model, result.output)
