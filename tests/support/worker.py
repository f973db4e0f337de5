"""Runs models on one build of llama.cpp through llama-cpp-python's own bindings, in a process of its own.

The build is chosen by LLAMA_CPP_LIB_PATH, so the same client drives the stock and the patched library.
Reads requests as JSON from stdin, a line each, and forks for each, since importing takes longer than most jobs. The results are
in the request's file (pickle: numpy arrays and strings) when the exit code is printed.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import re
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
import numpy as np

from gguf_firstlayer import convert, installation, isolation
from gguf_firstlayer.c_api import CSite

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
n_nodes: list[int] = []  # of the last context's graphs for prompts and for single tokens; one number if they are equal
pools: list[int] = []  # addresses of the pools of threads that a context runs on


@llama_cpp.llama_log_callback
def on_log(level, text, _user_data):
    line = text.decode(errors="replace")
    if level >= 3:  # warnings and errors; 5 continues a line
        messages.append(line)
    elif told := re.search(r"graph.*: nodes = ([\d /]+),", line):
        n_nodes[:] = [int(n) for n in told[1].split(" / ")]


class Model:
    def __init__(self, path, sidecar=None, cache=0, cache_rows=0, demand=None, check=None, **options):
        """A model with its sidecar, if it has one; with a row cache of `cache` MiB or "auto", or of `cache_rows` rows."""
        params = llama_cpp.llama_model_default_params()
        if cache_rows and (cached := cache_data(Model(path, cache=4096, **options))):
            cache = (cache_rows + 0.5) * cached["n_bytes_max"] / cached["n_rows_max"] / 2**20
        self.overrides = (llama_cpp.llama_model_kv_override * 4)()  # the last one ends them
        if sidecar:
            self.override("firstlayer.file", sidecar)
        if cache:
            self.override("firstlayer.cache", cache)
        if demand:
            self.override("firstlayer.demand", demand)
        if check:
            self.override("firstlayer.check", check)
        params.kv_overrides = self.overrides
        if "n_gpu_layers" not in options:
            self.no_device = (ctypes.c_void_p * 1)(None)  # a device would also get large products of layers on the CPU
            params.devices = ctypes.cast(self.no_device, ctypes.c_void_p)
        for key, value in options.items():
            setattr(params, key, value)
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError("".join(messages))
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def override(self, key, value):
        kinds = {str: ("STR", "val_str"), int: ("INT", "val_i64"), float: ("FLOAT", "val_f64")}
        tag, field = kinds[type(value)]
        place = next(override for override in self.overrides if not override.key)
        place.tag = getattr(llama_cpp, f"LLAMA_KV_OVERRIDE_TYPE_{tag}")
        place.key = key.encode()
        setattr(place.value, field, value.encode() if isinstance(value, str) else value)

    def context(self, trace=None, n_ctx=1024, **options):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
        params.n_threads = params.n_threads_batch = 1  # threads that wait for each other are slow on a busy machine
        for key, value in options.items():
            setattr(params, key, value)
        if trace is not None:
            params.cb_eval = trace
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("".join(messages))
        return context

    def tokens(self, spec):
        """Token ids: as given, random (count, seed), or of a text."""
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


def part_of_ggml(name):
    """One of the libraries that libllama depends on, in which Windows does not look for its functions."""
    return ctypes.CDLL(str(Path(os.environ["LLAMA_CPP_LIB_PATH"], installation.library_name(name))))


def cache_data(model):
    """What `llama_model_firstlayer_get_cache` says of a loaded model; None without a cache, and on the stock library."""
    names = ["n_rows", "n_rows_max", "n_hits", "n_misses", "n_bytes", "n_bytes_max", "t_us"]
    get = getattr(llama_cpp.llama_cpp._lib, "llama_model_firstlayer_get_cache", None)
    data = (ctypes.c_int64 * len(names))()
    if get is None or get(ctypes.c_void_p(model.model), data) != 0:
        return None
    return dict(zip(names, data, strict=True))


def decode(context, tokens, first=0, embd=None, parallel=False, run=llama_cpp.llama_decode, outputs=None):
    """Run tokens (or embeddings) at positions first, first + 1, ... and ask for logits of the last ones. Returns the status.

    outputs: how many; by default all
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
        batch.logits[i] = outputs is None or i >= n - outputs
    if embd is not None:
        ctypes.memmove(batch.embd, embd.ctypes.data, embd.nbytes)
        # models with positions along several axes want those of vectors axis by axis: time, height, width, and an unused one
        axes = [batch.pos[i] for i in range(n)] * 3 + [0] * n
        allocated = ctypes.cast(ctypes.cast(batch.pos, ctypes.c_void_p), ctypes.POINTER(llama_cpp.llama_pos))
        batch.pos = (llama_cpp.llama_pos * len(axes))(*axes)
    status = run(context, batch)
    if embd is not None:
        batch.pos = allocated
    llama_cpp.llama_batch_free(batch)
    return status


def logits(job):
    """Logits [n tokens, vocabulary] for each batch size."""
    model = Model(job["model"], **job.get("load", {}))
    tokens = model.tokens(job["tokens"])
    results = {}
    # the default, F16, is less precise than in other implementations
    cache = {"type_k": 0, "type_v": 0, "flash_attn_type": 0} if job.get("f32_cache") else {}
    for size in job["batches"]:
        context = model.context(**{"flash_attn_type": job.get("flash_attn", -1)} | cache)
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
    if cached := cache_data(model):
        results["cache"] = cached
    model.close()
    return results


def entry(model):
    """How to run a model: whether it returns vectors instead of logits, and whether it encodes before it decodes."""
    decodes = llama_cpp.llama_model_has_decoder(model.model)
    # draft models have encoders too, but for hidden states of their target model
    encodes = llama_cpp.llama_model_has_encoder(model.model) and llama_cpp.llama_model_decoder_start_token(model.model) >= 0
    context = model.context(flash_attn_type=0)
    pools = llama_cpp.llama_pooling_type(context) > 0 or not llama_cpp.llama_get_memory(context)
    llama_cpp.llama_free(context)
    return pools or not decodes, encodes and decodes


def outputs(job):
    """What a model of any kind computes from tokens, F32 [n, width] for each batch size.

    Decoders: logits of a sequence of all tokens. Encoder-decoders: the same, after encoding the tokens.
    Embedding models: a vector per token, each batch a sequence of its own; "parallel" is all tokens in one batch, each a
    sequence of its own.
    """
    model = Model(job["model"], **job.get("load", {}))
    tokens = model.tokens(job["tokens"])
    embeds, encodes = entry(model)

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
        context = model.context(flash_attn_type=job.get("flash_attn", 0), **options)
        if encodes:
            assert decode(context, tokens, run=llama_cpp.llama_encode) == 0
        if size == "parallel":
            results[size] = batch(context, tokens, 0, parallel=True) if embeds else None
        else:
            parts = [(first, tokens[first : first + size]) for first in range(0, len(tokens), size)]
            results[size] = np.concatenate([batch(context, part, 0 if embeds else first) for first, part in parts])
        llama_cpp.llama_free(context)
    results["cache"] = cache_data(model)
    results["nodes"] = (n_nodes[0], n_nodes[-1])
    model.close()
    return results


def greedy(job):
    """Greedy continuations, as token ids, of several prompts."""
    model = Model(job["model"], **job.get("load", {}))
    results = []
    for prompt in job["prompts"]:
        context = model.context()
        tokens = model.tokens(prompt)
        position, out = 0, []
        while len(out) < job["n_predict"]:
            assert decode(context, tokens, position, outputs=1) == 0
            position += len(tokens)
            row = llama_cpp.llama_get_logits_ith(context, len(tokens) - 1)
            tokens = [int(np.ctypeslib.as_array(row, (model.n_vocab,)).argmax())]
            out += tokens
        llama_cpp.llama_free(context)
        results.append(out)
    model.close()
    return results


def graph(job):
    """The computed nodes of batches of tokens: (operation, name, names of the operands, types of node and operands, shapes).

    size: batch size; by default, all tokens at once
    outputs: of how many tokens of a batch there are logits; by default, of all
    """
    model = Model(job["model"], **job.get("load", {}))
    op_desc = part_of_ggml("ggml-base").ggml_op_desc
    op_desc.restype, op_desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    nodes = []

    def visit(pointer, ask, _user_data):
        if ask:
            tensor = ctypes.cast(pointer, ctypes.POINTER(Tensor)).contents
            sources = [src.contents for src in tensor.src if src]
            names = [source.name.decode() for source in sources]
            types = (tensor.type, *(source.type for source in sources))
            shapes = (tuple(tensor.ne), *(tuple(source.ne) for source in sources))
            nodes.append((op_desc(pointer).decode(), tensor.name.decode(), names, types, shapes))
        return False

    callback = llama_cpp.ggml_backend_sched_eval_callback(visit)
    embeds, encodes = entry(model)
    options = {"flash_attn_type": job.get("flash_attn", -1), "embeddings": embeds} | job.get("context", {})
    context = model.context(trace=callback, **options)
    tokens = model.tokens(job["tokens"])
    if encodes or embeds:
        assert decode(context, tokens, run=llama_cpp.llama_encode) == 0
    if not embeds:
        size = job.get("size", len(tokens))
        for first in range(0, len(tokens), size):
            assert decode(context, tokens[first : first + size], first, outputs=job.get("outputs")) == 0
    llama_cpp.llama_free(context)
    model.close()
    return nodes


def embeddings(job):
    """Status and messages of llama_decode on a batch of vectors instead of tokens."""
    model = Model(job["model"], **job.get("load", {}))
    context = model.context()
    rows = np.ones((4, llama_cpp.llama_model_n_embd(model.model)), dtype=np.float32)
    status = decode(context, [0] * 4, 0, embd=rows)
    afterwards = decode(context, model.tokens({"count": 4, "seed": 1}), 0 if status else len(rows))
    llama_cpp.llama_free(context)
    model.close()
    return status, afterwards, "".join(messages)


def adapted(job):
    """Logits of the last tokens of a prompt (`outputs`, by default all) for each set of LoRA adapters, [index, scale]..., which
    are switched in one context. If llama.cpp rejects an adapter, its messages.
    """
    model = Model(job["model"], **job.get("load", {}))
    adapters = []
    for path in job["adapters"]:
        adapters.append(llama_cpp.llama_adapter_lora_init(model.model, path.encode()))
        if not adapters[-1]:
            return "".join(messages)
    context, tokens, results = model.context(**job.get("context", {})), model.tokens(job["tokens"]), []
    for chosen in job["sets"]:
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(chosen))(*(adapters[i] for i, _ in chosen))
        scales = (ctypes.c_float * len(chosen))(*(scale for _, scale in chosen))
        assert llama_cpp.llama_set_adapters_lora(context, handles, len(chosen), scales) == 0
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        n = job.get("outputs", len(tokens))
        assert decode(context, tokens, outputs=n) == 0, "".join(messages)
        results.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (n, model.n_vocab)).copy())
    llama_cpp.llama_free(context)
    model.close()
    return results


def uses(job):
    """What a loaded model reports about its sites: (name, width, table, column, used)."""
    model = Model(job["model"], **job.get("load", {}))
    library, site, results = llama_cpp.llama_cpp._lib, CSite(), []
    handle = ctypes.c_void_p(model.model)
    for i in range(library.llama_model_firstlayer_n_sites(handle)):
        assert library.llama_model_firstlayer_get_site(handle, i, ctypes.byref(site)) == 0
        results.append((site.name.decode(), site.width, site.table.decode(), site.column, site.used))
    assert library.llama_model_firstlayer_get_site(handle, len(results), ctypes.byref(site)) < 0
    model.close()
    return results


def devices(_job):
    """Names of the devices that the build has."""
    library = llama_cpp.llama_cpp._lib
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.restype, library.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.ggml_backend_dev_name.restype, library.ggml_backend_dev_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    count = library.ggml_backend_dev_count()
    return [library.ggml_backend_dev_name(library.ggml_backend_dev_get(i)).decode() for i in range(count)]


def converted_on(job):
    """Convert a model on a device of the build."""
    folder = tempfile.mkdtemp()
    os.symlink(os.environ["LLAMA_CPP_LIB_PATH"], os.path.join(folder, "bin"))
    installation.PACKAGE = Path(folder)
    # in the process of the analysis, too
    code = f"import pathlib; from gguf_firstlayer import installation; installation.PACKAGE = pathlib.Path({folder!r})\n"
    isolation._CHILD = isolation._CHILD.replace("from gguf_firstlayer.", f"{code}from gguf_firstlayer.", 1)
    convert(job["model"], job["output"], type="f32", device=job["device"])


def load(job):
    """ "" if a model loads, otherwise the messages of llama.cpp."""
    try:
        Model(job["model"], **job.get("load", {})).close()
    except RuntimeError as err:
        return str(err)
    return ""


def attacked(job):
    """Load a model and decode with it, as a user of a hostile file does: messages, "" if it runs, and the peak of memory."""
    message = ""
    try:
        model = Model(job["model"], **job.get("load", {}))
        context = model.context(n_ctx=64)
        for first, tokens in enumerate([[1, 2, 3, 4], [5], [6]]):
            if decode(context, tokens, first and first + 3) != 0:
                raise RuntimeError("".join(messages))
        llama_cpp.llama_free(context)
        model.close()
    except RuntimeError as err:
        message = str(err)
    with open("/proc/self/status") as file:  # what getrusage says may be of the process that started this one
        return message, 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def make_batch(context, parts):
    """A batch of runs of tokens, (ids of their sequences, tokens, number of outputs at the end). Each run continues where the
    first of its sequences ends.
    """
    memory, position, entries = llama_cpp.llama_get_memory(context), {}, []
    for seqs, tokens, n_outputs in parts:
        first = position.get(seqs[0], llama_cpp.llama_memory_seq_pos_max(memory, seqs[0]) + 1) if memory else 0
        entries += [(seqs, first + i, token, i >= len(tokens) - n_outputs) for i, token in enumerate(tokens)]
        position |= dict.fromkeys(seqs, first + len(tokens))
    batch = llama_cpp.llama_batch_init(len(entries), 0, max(len(seqs) for seqs, *_ in parts))
    batch.n_tokens = len(entries)
    for i, (seqs, place, token, is_output) in enumerate(entries):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place, len(seqs), is_output
        for j, seq in enumerate(seqs):
            batch.seq_id[i][j] = seq
    return batch


def given(model, context, parts):
    """Logits of the outputs of a batch, or of embedding models, the vectors of its sequences (with pooling) or tokens."""
    seqs = sorted({seq for seqs, *_ in parts for seq in seqs})
    count = sum(n_outputs for *_, n_outputs in parts)
    pooling = llama_cpp.llama_pooling_type(context)
    if pooling > 0 and model.embeddings:
        width = llama_cpp.llama_model_n_embd_out(model.model)
        if pooling == llama_cpp.LLAMA_POOLING_TYPE_RANK:
            width = llama_cpp.llama_model_n_cls_out(model.model)
        return np.array([llama_cpp.llama_get_embeddings_seq(context, seq)[:width] for seq in seqs], dtype=np.float32)
    if model.embeddings:
        width = llama_cpp.llama_model_n_embd_out(model.model)
        return np.ctypeslib.as_array(llama_cpp.llama_get_embeddings(context), (count, width)).copy()
    if count == 0:
        return np.empty((0, model.n_vocab), np.float32)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (count, model.n_vocab)).copy()


def state(context, seq=None):
    """Bytes of the state of a context, or of one sequence."""
    if seq is None:
        size, get = llama_cpp.llama_state_get_size(context), llama_cpp.llama_state_get_data
    else:
        size, get = llama_cpp.llama_state_seq_get_size(context, seq), llama_cpp.llama_state_seq_get_data
    data = np.empty(size, np.uint8)
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    written = get(context, pointer, size) if seq is None else get(context, pointer, size, seq)
    assert written == size, "".join(messages)
    return data


def load_state(context, path, seq=None):
    """Read what `save` wrote."""
    with open(path, "rb") as file:
        data = (ctypes.c_uint8 * (size := os.fstat(file.fileno()).st_size)).from_buffer_copy(file.read())
    if seq is None:
        assert llama_cpp.llama_state_set_data(context, data, size) == size, "".join(messages)
    else:
        assert llama_cpp.llama_state_seq_set_data(context, data, size, seq) == size, "".join(messages)


def control(model, context, seed):
    """Add a random vector to the output of every layer except the first, for which llama.cpp allows none."""
    width, layers = llama_cpp.llama_model_n_embd(model.model), llama_cpp.llama_model_n_layer(model.model) - 1
    vectors = np.random.default_rng(seed).normal(0, 0.3, width * layers).astype(np.float32)
    data = vectors.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama_cpp.llama_set_adapter_cvec(context, data, len(vectors), width, 1, layers) == 0


def threadpools(context, *sizes):
    """Run a context on pools of its own (llama_attach_threadpool); without sizes, no longer, and free them."""
    llama, base, cpu = llama_cpp.llama_cpp._lib, part_of_ggml("ggml-base"), part_of_ggml("ggml-cpu")
    new, free = cpu.ggml_threadpool_new, cpu.ggml_threadpool_free
    new.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    if sizes:
        for size in sizes:
            params = (ctypes.c_char * 1024)()
            base.ggml_threadpool_params_init(params, size)
            pools.append(new(params))
        llama.llama_attach_threadpool(ctypes.c_void_p(context), *map(ctypes.c_void_p, pools))
    else:
        llama.llama_detach_threadpool(ctypes.c_void_p(context))
        while pools:
            free(pools.pop())


def hidden_states(model, context, count):
    """What drafts read of a context (`llama_get_embeddings_nextn`), F32 [count, width]; for none, ask the context for them."""
    library, handle = llama_cpp.llama_cpp._lib, ctypes.c_void_p(context)  # these functions are C++
    if count == 0:
        library._Z26llama_set_embeddings_nextnP13llama_contextbb(handle, ctypes.c_bool(True), ctypes.c_bool(False))
        return None
    get = library._Z26llama_get_embeddings_nextnP13llama_context
    get.restype = ctypes.POINTER(ctypes.c_float)
    return np.ctypeslib.as_array(get(handle), (count, llama_cpp.llama_model_n_embd_out(model.model))).copy()


def session(job):
    """Run a list of steps in a context. Returns the results of those that have any, in order.

    decode [sequences, tokens, outputs]...      one llama_decode, with that many outputs at the end, by default all
    save path [sequence], load path [sequence]  the state (llama_state_get_data, llama_state_set_data)
    encode tokens                               one llama_encode
    embeddings flag                             llama_set_embeddings
    state                                       the bytes of the state of the context
    embed first count seed                      one llama_decode of random vectors instead of tokens, as for images
    resident                                    resident bytes of the process
    control seed                                a random control vector
    cache                                       hits and misses of the row cache
    log                                         what llama.cpp warned of
    logits                                      whether there are any
    threads [n n]                               pools for single tokens and for batches; without, they are detached and freed
    fail                                        the next graph of the row cache throws (tests/support/failing.cpp, preloaded)
    hidden                                      from now on, ask for hidden states of all tokens, and return each decode's
    rm, cp, keep, add, div ...                  llama_memory_seq_*
    """
    n_before = len(messages)
    model = Model(job["model"], **job.get("load", {}))
    model.embeddings, hidden = job.get("context", {}).get("embeddings", False), False
    context = model.context(**job.get("context", {}))
    memory, results = llama_cpp.llama_get_memory(context), []
    for step, *arguments in job["steps"]:
        if step == "decode":
            texts = [(seqs, model.tokens(tokens), outputs) for seqs, tokens, *outputs in arguments]
            parts = [(seqs, tokens, outputs[0] if outputs else len(tokens)) for seqs, tokens, outputs in texts]
            batch = make_batch(context, parts)
            status = llama_cpp.llama_decode(context, batch)
            llama_cpp.llama_batch_free(batch)
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status}: {''.join(messages)}")
            results.append(given(model, context, parts))
            if hidden:
                results.append(hidden_states(model, context, sum(len(tokens) for _, tokens, _ in parts)))
        elif step == "hidden":
            hidden = True
            hidden_states(model, context, 0)
        elif step == "embeddings":
            (model.embeddings,) = arguments
            llama_cpp.llama_set_embeddings(context, model.embeddings)
        elif step == "encode":
            assert decode(context, model.tokens(*arguments), run=llama_cpp.llama_encode) == 0, "".join(messages)
        elif step == "state":
            results.append(state(context))
        elif step == "embed":
            first, count, seed = arguments
            width = llama_cpp.llama_model_n_embd_inp(model.model)
            rows = np.random.default_rng(seed).normal(0, 0.1, (count, width)).astype(np.float32)
            if decode(context, [0] * count, first, embd=rows) != 0:
                raise RuntimeError("".join(messages))
            results.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (count, model.n_vocab)).copy())
        elif step == "resident":
            with open("/proc/self/status") as file:
                status = dict(line.split(":", 1) for line in file)
            results.append(np.array([int(status["VmRSS"].split()[0]) * 1024]))
        elif step == "mapped":
            with open("/proc/self/smaps") as file:
                lines = [line.split() for line in file]
            starts = [i for i, line in enumerate(lines) if line[-1] == arguments[0]]
            sizes = [next(line for line in lines[start:] if line[0] == "Rss:")[1] for start in starts]
            results.append(np.array([1024 * sum(map(int, sizes))]))
        elif step == "cache":
            data = cache_data(model)
            results.append(np.array([data["n_hits"], data["n_misses"]]))
        elif step == "threads":
            threadpools(context, *arguments)
        elif step == "fail":
            ctypes.CDLL(None).fail_once()
        elif step == "logits":
            results.append(np.array([bool(llama_cpp.llama_get_logits(context))]))
        elif step == "log":
            results.append(np.array(["".join(messages)]))
        elif step == "save":
            path, *seq = arguments
            state(context, *seq).tofile(path)
        elif step == "load":
            load_state(context, *arguments)
        elif step == "control":
            control(model, context, *arguments)
        else:
            assert getattr(llama_cpp, f"llama_memory_seq_{step}")(memory, *arguments) in (None, True)
    llama_cpp.llama_free(context)
    # equal to the source's output would also be that of a model whose cache, or demand, is not used
    load, asks = job.get("load", {}), {step for step, *_ in job["steps"]}
    assert not (load.get("cache") or load.get("cache_rows")) or cache_data(model)["n_misses"] > 0
    if load.get("demand") and not asks & {"log", "logits", "hidden"}:  # who asks for these may read everything
        assert any("nobody reads" in message for message in messages[n_before:]), f"demand was not used: {job['steps']}"
    model.close()
    return results


def training(job):
    """A context decodes, others train weights for an epoch each, and the first decodes again: logits before and after.

    The job's `stages` are parts of names of weights that are trained one after the other; by default, all are.
    """
    library = llama_cpp.llama_cpp._lib

    def function(name, result, *arguments):
        found = getattr(library, name)
        found.restype, found.argtypes = result, arguments
        return found

    class Params(ctypes.Structure):
        """`struct llama_opt_params`, which the bindings declare without its last member."""

        _fields_ = [*llama_cpp.llama_cpp.llama_opt_params._fields_, ("optimizer_type", ctypes.c_int)]

    pointer, i64, f32 = ctypes.c_void_p, ctypes.c_int64, 0
    size, count = 256, 4  # llama.cpp trains on whole contexts
    model = Model(job["model"], load_mode=0, **job.get("load", {}))
    options = {"n_ctx": size, "n_batch": size, "n_ubatch": size, "type_k": f32, "type_v": f32, "flash_attn_type": 0}
    reader = model.context(**options)

    def logits():
        tokens = model.tokens(job["tokens"])
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(reader), True)
        assert decode(reader, tokens) == 0, "".join(messages)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(reader), (len(tokens), model.n_vocab)).copy()

    before = logits()
    i32 = 26  # enum ggml_type
    dataset = function("ggml_opt_dataset_init", pointer, ctypes.c_int, ctypes.c_int, i64, i64, i64, i64)(
        i32, i32, size, size, count, 1
    )
    ids = np.random.default_rng(1).integers(0, model.n_vocab, (count, size), np.int32)
    for get, values in (("ggml_opt_dataset_data", ids), ("ggml_opt_dataset_labels", np.roll(ids, -1))):
        tensor = ctypes.cast(function(get, pointer, pointer)(dataset), ctypes.POINTER(Tensor)).contents
        ctypes.memmove(tensor.data, np.ascontiguousarray(values).ctypes.data, values.nbytes)
    name_of = function("ggml_get_name", ctypes.c_char_p, pointer)
    rates = ctypes.cast(library.ggml_opt_get_default_optimizer_params, pointer)
    start = function("llama_opt_init", None, pointer, pointer, Params)
    result = function("ggml_opt_result_init", pointer)
    epoch = function("llama_opt_epoch", None, pointer, pointer, pointer, pointer, i64, pointer, pointer)
    for stage in job.get("stages", [""]):
        part, trainer = stage.encode(), model.context(**options)
        chosen = llama_cpp.llama_cpp.llama_opt_param_filter(lambda tensor, _data, part=part: part in name_of(tensor))
        start(trainer, model.model, Params(0, chosen, None, rates, None, 0))
        epoch(trainer, dataset, result(), result(), count - 1, None, None)
    return before, logits(), "".join(messages)


def injection(job):
    """A batch of a target's hidden states, of `width` values, which a draft makes keys and values of: status, messages, and
    logits of tokens that attend to them.
    """
    model = Model(job["model"], **job.get("load", {}))
    context, tokens = model.context(), model.tokens({"count": 4, "seed": 1})
    states = np.random.default_rng(1).normal(size=(job["count"], job["width"])).astype(np.float32)
    status = decode(context, [0] * len(states), embd=states, outputs=0)
    if status != 0 or decode(context, tokens, len(states)) != 0:
        return status, "".join(messages), None
    return status, "", np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens), model.n_vocab)).copy()


def refused_saving(job):
    """What llama.cpp says if it does not write a loaded model to a file."""
    model = Model(job["model"], **job.get("load", {}))
    llama_cpp.llama_model_save_to_file(model.model, job["path"].encode())
    return "".join(messages)


def contexts(job):
    """Logits of texts, each in batches of 16 in contexts of its own, made and freed by its own thread several times."""
    model = Model(job["model"], **job.get("load", {}))

    def run(text):
        results = []
        for _ in range(job["times"]):
            context = model.context(n_ubatch=16)
            assert decode(context, model.tokens(text)) == 0
            n = len(model.tokens(text))
            results.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (n, model.n_vocab)).copy())
            llama_cpp.llama_free(context)
        return results

    with ThreadPoolExecutor(len(job["texts"])) as pool:
        results = list(pool.map(run, job["texts"]))
    data = cache_data(model)
    model.close()
    return results, data


def saved(job):
    """Bytes of the file that llama.cpp writes of a loaded model, after it decoded some tokens."""
    model = Model(job["model"], **job.get("load", {}))
    context = model.context()
    assert decode(context, model.tokens(job["tokens"])) == 0
    llama_cpp.llama_free(context)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "saved.gguf")
        llama_cpp.llama_model_save_to_file(model.model, path.encode())
        model.close()
        with open(path, "rb") as file:
            return file.read()


def sample(job):
    """Token ids that a chain of samplers draws, and how many of them were sampled in the graph ("backend")."""
    model = Model(job["model"], **job.get("load", {}))
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for name, *arguments in job["chain"]:
        if name == "grammar":
            arguments = [model.vocab, arguments[0].encode(), b"root"]
        llama_cpp.llama_sampler_chain_add(chain, getattr(llama_cpp, f"llama_sampler_init_{name}")(*arguments))
    options = {}
    if job["backend"]:
        config = llama_cpp.llama_sampler_seq_config(0, ctypes.cast(chain, ctypes.c_void_p))
        options = {"samplers": ctypes.pointer(config), "n_samplers": 1}
    context = model.context(**options)
    tokens, out, in_graph = model.tokens(job["prompt"]), [], 0
    while len(out) < job["n_predict"]:
        batch = make_batch(context, [([0], tokens, 1)])
        assert llama_cpp.llama_decode(context, batch) == 0, "".join(messages)
        llama_cpp.llama_batch_free(batch)
        in_graph += llama_cpp.llama_get_sampled_token_ith(context, -1) >= 0
        tokens = [llama_cpp.llama_sampler_sample(chain, context, -1)]
        out += tokens
    llama_cpp.llama_free(context)
    llama_cpp.llama_sampler_free(chain)
    model.close()
    return out, in_graph


def on_a_small_stack(job):
    """What another job gives in a thread with a stack of 1 MiB, as programs in some languages have."""
    results = []
    threading.stack_size(1 << (22 if "libtsan" in os.environ.get("SANITIZER", "") else 20))  # its frames are larger
    thread = threading.Thread(target=lambda: results.append(globals()[job["job"]](job)))
    thread.start()
    thread.join()
    return results[0]


def perform(jobs, out):
    """Write the results of jobs to a file."""
    llama_cpp.llama_log_set(on_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    results = []
    for job in jobs:
        messages.clear()
        results.append(globals()[job["run"]](job))
    with open(out, "wb") as file:
        pickle.dump(results, file)


def child(request):
    """Perform the jobs of a request in its environment, which is a process of its own, and end it."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(request["environment"])
        log = os.open(request["log"], os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        perform(request["jobs"], request["out"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        if not (pid := os.fork() if request["forks"] else 0):
            child(request)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
