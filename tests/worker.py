"""Runs models on one build of llama.cpp through llama-cpp-python's own bindings, in a process of its own.

The build is chosen by LLAMA_CPP_LIB_PATH, so the same client drives the stock and the patched library.
Reads jobs as JSON from stdin, writes results to the file given as argument (pickle: numpy arrays and strings).
"""

from __future__ import annotations

import ctypes
import json
import pickle
import sys

import llama_cpp
import numpy as np

from gguf_firstlayer.runtime import _CSite

GGML_MAX_SRC = 10


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * GGML_MAX_SRC),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]

messages: list[str] = []


@llama_cpp.llama_log_callback
def on_log(level, text, _user_data):
    if level >= 3:  # warnings and errors; 5 continues a line
        messages.append(text.decode(errors="replace"))


class Model:
    def __init__(self, path, **options):
        params = llama_cpp.llama_model_default_params()
        for key, value in options.items():
            setattr(params, key, value)
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError("".join(messages))
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def context(self, trace=None, n_ctx=1024, **options):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
        params.n_threads = params.n_threads_batch = 2
        for key, value in options.items():
            setattr(params, key, value)
        if trace is not None:
            params.cb_eval = trace
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("".join(messages))
        return context

    def tokens(self, spec):
        """Token ids: given, random ([count, seed]), or of a text."""
        if isinstance(spec, str):
            text = spec.encode()
            ids = (llama_cpp.llama_token * (len(text) + 8))()
            n = llama_cpp.llama_tokenize(self.vocab, text, len(text), ids, len(ids), True, True)
            return list(ids[:n])
        if isinstance(spec, dict):
            return np.random.default_rng(spec["seed"]).integers(0, self.n_vocab, spec["count"]).tolist()
        return spec

    def close(self):
        llama_cpp.llama_model_free(self.model)


def decode(context, tokens, first=0, embd=None, parallel=False, run=llama_cpp.llama_decode):
    """Run tokens (or embeddings) at positions first, first + 1, ... and ask for all logits. Returns the status.

    parallel: each token is a sequence of its own
    """
    n = len(tokens)
    batch = llama_cpp.llama_batch_init(n, 0 if embd is None else embd.shape[1], 1)
    batch.n_tokens = n
    for i in range(n):
        if embd is None:
            batch.token[i] = tokens[i]
        batch.pos[i] = first + (0 if parallel else i)
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = i if parallel else 0
        batch.logits[i] = 1
    if embd is not None:
        ctypes.memmove(batch.embd, embd.ctypes.data, embd.nbytes)
    status = run(context, batch)
    llama_cpp.llama_batch_free(batch)
    return status


def logits(job):
    """Logits [n tokens, vocabulary] for each batch size."""
    model = Model(job["model"])
    tokens = model.tokens(job["tokens"])
    results = {}
    # the default, F16, is coarser than other implementations
    cache = {"type_k": 0, "type_v": 0, "flash_attn_type": 0} if job.get("f32_cache") else {}
    for size in job["batches"]:
        context = model.context(**cache)
        if job.get("warmup"):
            llama_cpp.llama_set_warmup(context, True)
            assert decode(context, tokens[:2], 0) == 0, "".join(messages)
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            llama_cpp.llama_set_warmup(context, False)
        rows = []
        for first in range(0, len(tokens), size):
            part = tokens[first : first + size]
            if (status := decode(context, part, first)) != 0:
                raise RuntimeError(f"llama_decode returned {status}: {''.join(messages)}")
            rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(part), model.n_vocab)).copy())
        results[size] = np.concatenate(rows)
        llama_cpp.llama_free(context)
    model.close()
    return results


def outputs(job):
    """What any kind of model computes of tokens, F32 [n, width] for each batch size.

    Decoders: logits of a sequence of all tokens. Encoders that have a decoder: the same, after they have encoded the tokens.
    Embedding models: a vector per token, each batch a sequence of its own; "parallel" is all tokens in one batch, each a
    sequence of its own.
    """
    model = Model(job["model"])
    tokens = model.tokens(job["tokens"])
    # drafts have encoders as well, but for hidden states of the model they draft for
    encodes = llama_cpp.llama_model_has_encoder(model.model) and llama_cpp.llama_model_decoder_start_token(model.model) >= 0
    decodes = llama_cpp.llama_model_has_decoder(model.model)
    context = model.context(flash_attn_type=0)
    pools = llama_cpp.llama_pooling_type(context) > 0 or not llama_cpp.llama_get_memory(context)
    llama_cpp.llama_free(context)
    embeds = pools or not decodes

    def batch(context, part, first, **options):
        step = llama_cpp.llama_encode if embeds else llama_cpp.llama_decode
        if (status := decode(context, part, first, run=step, **options)) != 0:
            raise RuntimeError(f"{step.__name__} returned {status}: {''.join(messages)}")
        get, width = llama_cpp.llama_get_logits, model.n_vocab
        if embeds:
            get, width = llama_cpp.llama_get_embeddings, llama_cpp.llama_model_n_embd_out(model.model)
        return np.ctypeslib.as_array(get(context), (len(part), width)).copy()

    results = {}
    for size in job["batches"]:
        options = {"embeddings": True, "pooling_type": 0, "n_seq_max": len(tokens), "kv_unified": True} if embeds else {}
        context = model.context(flash_attn_type=0, n_threads=1, n_threads_batch=1, **options)
        if encodes and decodes:
            assert decode(context, tokens, run=llama_cpp.llama_encode) == 0
        if size == "parallel":
            results[size] = batch(context, tokens, 0, parallel=True) if embeds else None
        else:
            parts = [(first, tokens[first : first + size]) for first in range(0, len(tokens), size)]
            results[size] = np.concatenate([batch(context, part, 0 if embeds else first) for first, part in parts])
        llama_cpp.llama_free(context)
    model.close()
    return results


def greedy(job):
    """Greedy continuations, as token ids, of several prompts."""
    model = Model(job["model"])
    results = []
    for prompt in job["prompts"]:
        context = model.context()
        tokens = model.tokens(prompt)
        position, out = 0, []
        while len(out) < job["n_predict"]:
            assert decode(context, tokens, position) == 0
            position += len(tokens)
            row = llama_cpp.llama_get_logits_ith(context, len(tokens) - 1)
            tokens = [int(np.ctypeslib.as_array(row, (model.n_vocab,)).argmax())]
            out += tokens
        llama_cpp.llama_free(context)
        results.append(out)
    model.close()
    return results


def graph(job):
    """The computed nodes of one batch: (operation, name, names of the operands).

    encode: of a batch that is encoded
    """
    model = Model(job["model"])
    op_desc = llama_cpp.llama_cpp._lib.ggml_op_desc  # in a library that libllama depends on
    op_desc.restype, op_desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    nodes = []

    def visit(pointer, ask, _user_data):
        if ask:
            tensor = ctypes.cast(pointer, ctypes.POINTER(Tensor)).contents
            sources = [src.contents.name.decode() for src in tensor.src if src]
            nodes.append((op_desc(pointer).decode(), tensor.name.decode(), sources))
        return False

    callback = llama_cpp.ggml_backend_sched_eval_callback(visit)
    context = model.context(trace=callback)
    assert decode(context, model.tokens(job["tokens"]), 0) == 0
    llama_cpp.llama_free(context)
    model.close()
    return nodes


def embeddings(job):
    """Status and messages of llama_decode on a batch of vectors instead of tokens."""
    model = Model(job["model"])
    context = model.context()
    rows = np.ones((4, llama_cpp.llama_model_n_embd(model.model)), dtype=np.float32)
    status = decode(context, [0] * 4, 0, embd=rows)
    afterwards = decode(context, model.tokens({"count": 4, "seed": 1}), 0 if status else len(rows))
    llama_cpp.llama_free(context)
    model.close()
    return status, afterwards, "".join(messages)


def uses(job):
    """What a loaded model says of its sites: (name, width, table, column, used)."""
    model = Model(job["model"])
    library, site, results = llama_cpp.llama_cpp._lib, _CSite(), []
    handle = ctypes.c_void_p(model.model)
    for i in range(library.llama_model_firstlayer_n_sites(handle)):
        assert library.llama_model_firstlayer_get_site(handle, i, ctypes.byref(site)) == 0
        results.append((site.name.decode(), site.width, site.table.decode(), site.column, site.used))
    assert library.llama_model_firstlayer_get_site(handle, len(results), ctypes.byref(site)) < 0
    model.close()
    return results


def load(job):
    """ "" if a model loads, or what llama.cpp said."""
    try:
        Model(job["model"]).close()
    except RuntimeError as err:
        return str(err)
    return ""


if __name__ == "__main__":
    llama_cpp.llama_log_set(on_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    results = []
    for job in json.load(sys.stdin):
        messages.clear()
        results.append(globals()[job["run"]](job))
    with open(sys.argv[1], "wb") as out:
        pickle.dump(results, out)
