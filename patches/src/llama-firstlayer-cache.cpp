#include "llama-firstlayer-cache.h"

#include "llama-firstlayer-builder.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <stdexcept>

static const size_t MIB = 1024 * 1024;

// what `auto` takes: rows for the distinct tokens of some 30,000 tokens of text, unless that is much of the model's own size
static const int64_t AUTO_ROWS     = 4096;
static const size_t  AUTO_SHARE    = 32;
static const size_t  AUTO_AT_LEAST = 16 * MIB;

//
// fill graphs
//

// copies t and what it is computed from; weights and the rows of the cache stay what they are
static ggml_tensor * copy_node(ggml_context *                                           ctx,
                               ggml_tensor *                                            t,
                               std::unordered_map<const ggml_tensor *, ggml_tensor *> & copies) {
    if (!t || (t->op == GGML_OP_NONE && !(t->flags & GGML_TENSOR_FLAG_INPUT))) {
        return t;
    }
    ggml_tensor *& known = copies[t];
    if (known) {
        return known;
    }
    ggml_tensor * res = ggml_dup_tensor(ctx, t);
    known             = res;

    std::copy_n(t->nb, GGML_MAX_DIMS, res->nb);
    std::copy(std::begin(t->op_params), std::end(t->op_params), res->op_params);
    ggml_set_name(res, ggml_get_name(t));
    res->op        = t->op;
    res->flags     = t->flags;
    res->view_offs = t->view_offs;
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        res->src[i] = copy_node(ctx, t->src[i], copies);
    }
    res->view_src = copy_node(ctx, t->view_src, copies);
    return res;
}

// a graph of its own with the nodes that `roots` are computed from
static llama_firstlayer_fill_graph copy_graph(const std::vector<ggml_tensor *> & roots,
                                              const std::vector<ggml_tensor *> & tokens,
                                              const ggml_tensor *                slots,
                                              size_t                             n_tensors) {
    const ggml_init_params params = {
        /*.mem_size   =*/n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    llama_firstlayer_fill_graph res;
    res.ctx.reset(ggml_init(params));
    res.gf = ggml_new_graph_custom(res.ctx.get(), n_tensors, false);

    std::unordered_map<const ggml_tensor *, ggml_tensor *> copies;
    for (ggml_tensor * root : roots) {
        ggml_build_forward_expand(res.gf, copy_node(res.ctx.get(), root, copies));
    }
    for (const ggml_tensor * t : tokens) {
        const auto it = copies.find(t);
        if (it != copies.end()) {
            res.tokens.push_back(it->second);
        }
    }
    res.slots = copies.at(slots);
    return res;
}

llama_firstlayer_fill::llama_firstlayer_fill(const llama_firstlayer_fill_graph * templates,
                                             size_t                              n_templates,
                                             const llm_graph_params &            params) {
    std::vector<ggml_backend_t> backends;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(params.sched); ++i) {
        backends.push_back(ggml_backend_sched_get_backend(params.sched, i));
    }

    for (size_t i = 0; i < n_templates; ++i) {
        const auto &               from = templates[i];
        std::vector<ggml_tensor *> roots(ggml_graph_nodes(from.gf),
                                         ggml_graph_nodes(from.gf) + ggml_graph_n_nodes(from.gf));
        const size_t               n_tensors = 2 * roots.size() + GGML_DEFAULT_GRAPH_SIZE;

        graph cur;
        static_cast<llama_firstlayer_fill_graph &>(cur) = copy_graph(roots, from.tokens, from.slots, n_tensors);
        cur.sched.reset(ggml_backend_sched_new(backends.data(), nullptr, backends.size(), n_tensors, false, false));
        if (!cur.sched || !ggml_backend_sched_alloc_graph(cur.sched.get(), cur.gf)) {
            throw std::runtime_error("cannot allocate the memory for computing rows");
        }
        graphs.push_back(std::move(cur));
    }

    // until a first graph of the context sets the number
    ggml_backend_t     cpu = backends.back();
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu));
    if (auto * set_n_threads =
            (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set_n_threads(cpu, params.cparams.n_threads_batch);
    }
}

bool llama_firstlayer_fill::compute(const std::vector<llama_token> & tokens,
                                    const std::vector<int32_t> &     slots,
                                    int32_t                          padding) {
    for (size_t first = 0; first < tokens.size();) {
        const size_t n_left = tokens.size() - first;

        // the smallest that holds them all with little padding, or else the largest that is full
        const auto size_of = [](const graph & g) {
            return (size_t) g.slots->ne[0];
        };
        auto cur = std::find_if(graphs.begin(), graphs.end(), [&](const graph & g) { return size_of(g) >= n_left; });
        if (cur != graphs.begin() && (cur == graphs.end() || 2 * size_of(*cur) > 3 * n_left)) {
            --cur;
        }
        const size_t size = size_of(*cur);
        const size_t n    = std::min(size, n_left);

        std::vector<llama_token> ids(tokens.begin() + first, tokens.begin() + first + n);
        std::vector<int64_t>     rows(slots.begin() + first, slots.begin() + first + n);
        while (ids.size() < size) {
            ids.push_back(ids.front());
            rows.push_back(padding + rows.size() - n);
        }
        for (ggml_tensor * t : cur->tokens) {
            ggml_backend_tensor_set(t, ids.data(), 0, ggml_nbytes(t));
        }
        ggml_backend_tensor_set(cur->slots, rows.data(), 0, ggml_nbytes(cur->slots));

        if (ggml_backend_sched_graph_compute(cur->sched.get(), cur->gf) != GGML_STATUS_SUCCESS) {
            return false;
        }
        first += n;
    }
    return true;
}

//
// cache
//

std::vector<uint32_t> llama_firstlayer_cache::fill_sizes(bool on_cpu) {
    return on_cpu ? std::vector<uint32_t>{ 1, 2, 4, 8, 16, 32, MAX_FILL } : std::vector<uint32_t>{ MAX_FILL };
}

std::vector<ggml_tensor *> llama_firstlayer_cache::choose_sites(const llama_firstlayer_walk & walk) {
    return walk.sites(AUTO_ROWS, sizeof(float));
}

// where rows can be looked up and written; the CPU does both
static bool supports_rows(ggml_backend_dev_t dev, ggml_context * ctx, ggml_tensor * rows) {
    ggml_tensor * ids   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    ggml_tensor * slots = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 1);
    ggml_tensor * row   = ggml_get_rows(ctx, rows, ids);
    return ggml_backend_dev_supports_op(dev, row) &&
           ggml_backend_dev_supports_op(dev, ggml_set_rows(ctx, rows, row, slots));
}

llama_firstlayer_cache::llama_firstlayer_cache(ggml_backend_dev_t layer_dev,
                                               int64_t            row_width,
                                               int64_t            n_vocab,
                                               bool               on_cpu,
                                               size_t             max_bytes) :
    dev(layer_dev),
    slot_of(n_vocab, NONE) {
    const size_t row_size = row_width * sizeof(float);
    n_slots               = std::min<int64_t>(max_bytes / row_size, n_vocab);
    if (n_slots < 1) {
        throw std::runtime_error(format("a row takes %zu bytes, more than the cache of %zu", row_size, max_bytes));
    }
    const int64_t n_rows = n_slots + MAX_FILL - 1;

    const ggml_init_params params = {
        /*.mem_size   =*/8 * ggml_tensor_overhead(),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    {
        const ggml_context_ptr probe(ggml_init(params));
        if (!supports_rows(dev, probe.get(), ggml_new_tensor_2d(probe.get(), GGML_TYPE_F32, row_width, n_rows))) {
            dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        }
    }
    // memory that is never used is never touched, on the CPU
    ctx.reset(ggml_init(params));
    rows = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, row_width, n_rows);
    ggml_set_name(rows, "firstlayer.cache");
    buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_dev_buffer_type(dev)));
    if (!buf) {
        throw std::runtime_error(format("cannot allocate %zu MiB", ggml_nbytes(rows) / MIB));
    }
    ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
}

bool llama_firstlayer_cache::add_template(ggml_context *                              ctx,
                                          const llama_firstlayer_walk &               walk,
                                          const std::vector<llama_firstlayer::site> & sites) {
    std::vector<ggml_tensor *> found(sites.size(), nullptr);
    for (const auto & [t, i] : walk.find(sites)) {
        found[i] = t;
    }
    if (std::count(found.begin(), found.end(), nullptr) > 0) {
        return false;
    }

    ggml_tensor * slots = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, walk.tokens().front()->ne[0]);
    ggml_set_input(slots);

    std::vector<ggml_tensor *> roots;
    size_t                     n_tensors = 8 * sites.size() + 8;
    for (size_t i = 0; i < sites.size(); ++i) {
        const auto & site = sites[i];
        n_tensors += walk.ancestors(found[i]).size();

        ggml_tensor * columns =
            ggml_view_2d(ctx, rows, site.width, rows->ne[1], rows->nb[1], site.column * sizeof(float));
        roots.push_back(ggml_set_rows(ctx, columns, walk.as_rows(ctx, found[i]), slots));
    }
    templates.push_back(copy_graph(roots, walk.tokens(), slots, n_tensors));
    return true;
}

void llama_firstlayer_cache::keep_equal_sizes(const llm_graph_params & params) {
    std::vector<llama_token> tokens;
    std::vector<int32_t>     places;
    for (int32_t i = 0; i < std::min<int32_t>({ n_slots, (int32_t) slot_of.size(), N_TRIED }); ++i) {
        tokens.push_back(i);
        places.push_back(i);
    }
    const auto rows_of = [&](size_t i) {
        llama_firstlayer_fill fill(&templates[i], 1, params);
        std::vector<uint8_t>  res(tokens.size() * rows->nb[1]);
        if (!fill.compute(tokens, places, n_slots)) {
            throw std::runtime_error("computing rows failed");
        }
        ggml_backend_tensor_get(rows, res.data(), 0, res.size());
        return res;
    };

    // the largest that is not mostly padding
    size_t reference = templates.size() - 1;
    while (reference > 0 && templates[reference].slots->ne[0] > N_TRIED) {
        reference--;
    }
    if (reference == 0) {
        return;
    }
    const auto expected = rows_of(reference);
    for (size_t i = reference; i-- > 0;) {
        if (rows_of(i) != expected) {
            templates.erase(templates.begin() + i);
        }
    }
}

std::shared_ptr<llama_firstlayer_fill> llama_firstlayer_cache::get_fill(const llm_graph_params & params) {
    // the CPU backend, which a context has in any case
    ggml_backend_t key =
        ggml_backend_sched_get_backend(params.sched, ggml_backend_sched_get_n_backends(params.sched) - 1);

    const std::lock_guard<std::mutex> lock(mutex);

    auto res = fills[key].lock();
    if (!res) {
        for (auto it = fills.begin(); it != fills.end();) {
            it = it->second.expired() ? fills.erase(it) : std::next(it);
        }
        try {
            res        = std::make_shared<llama_firstlayer_fill>(templates.data(), templates.size(), params);
            fills[key] = res;
        } catch (const std::exception & err) {
            LLAMA_LOG_WARN("%s: the first layer is computed without a cache: %s\n", __func__, err.what());
        }
    }
    return res;
}

void llama_firstlayer_cache::pin(int32_t i) {
    n_pinned += slots[i].n_pins++ == 0;
    slots[i].recent = true;
}

void llama_firstlayer_cache::unpin(std::vector<int32_t> & taken) {
    for (const int32_t i : taken) {
        if (i >= 0) {
            n_pinned -= --slots[i].n_pins == 0;
        }
    }
    taken.clear();
}

void llama_firstlayer_cache::release(std::vector<int32_t> & taken) {
    const std::lock_guard<std::mutex> lock(mutex);
    unpin(taken);
}

// the next slot that was not used for a while; there must be one that is not pinned
int32_t llama_firstlayer_cache::take_slot() {
    if ((int32_t) slots.size() < n_slots) {
        slots.push_back({ LLAMA_TOKEN_NULL, 0, false });
        return slots.size() - 1;
    }
    for (;; hand = (hand + 1) % n_slots) {
        slot & cur = slots[hand];
        if (cur.n_pins == 0 && !cur.recent) {
            if (cur.token != LLAMA_TOKEN_NULL) {
                slot_of[cur.token] = NONE;
            }
            return hand;
        }
        cur.recent = cur.recent && cur.n_pins > 0;
    }
}

bool llama_firstlayer_cache::acquire(llama_firstlayer_fill & fill,
                                     const llama_token *     tokens,
                                     uint32_t                n_tokens,
                                     std::vector<int32_t> &  taken) {
    const std::lock_guard<std::mutex> lock(mutex);
    unpin(taken);

    // first those that are there, so that they are not evicted
    std::vector<llama_token> missing;
    taken.resize(n_tokens);
    for (uint32_t i = 0; i < n_tokens; ++i) {
        int32_t & known = slot_of[tokens[i]];
        if (known == NONE) {
            known = PENDING;
            missing.push_back(tokens[i]);
        }
        taken[i] = known;
        if (known >= 0) {
            pin(known);
        }
    }
    const bool fits = (int64_t) missing.size() <= n_slots - n_pinned;

    if (fits && !missing.empty()) {
        std::vector<int32_t> slots_missing;
        for (const llama_token token : missing) {
            const int32_t i = take_slot();
            slots[i].token  = token;
            slot_of[token]  = i;
            slots_missing.push_back(i);
            pin(i);  // so that it is not taken again
        }
        for (uint32_t i = 0; i < n_tokens; ++i) {
            if (taken[i] == PENDING) {
                taken[i] = slot_of[tokens[i]];
                pin(taken[i]);
            }
        }
        const int64_t start = ggml_time_us();
        const bool    ok    = fill.compute(missing, slots_missing, n_slots);
        t_us += ggml_time_us() - start;

        unpin(slots_missing);
        if (ok) {
            n_hits += n_tokens - missing.size();
            n_misses += missing.size();
            return true;
        }
    }
    if (missing.empty()) {
        n_hits += n_tokens;
        return true;
    }

    for (const llama_token token : missing) {
        if (slot_of[token] >= 0) {
            slots[slot_of[token]].token = LLAMA_TOKEN_NULL;
        }
        slot_of[token] = NONE;
    }
    unpin(taken);
    return false;
}

llama_firstlayer_cache_data llama_firstlayer_cache::get_data() const {
    const std::lock_guard<std::mutex> lock(mutex);

    const int64_t n_rows   = slots.size();
    const int64_t row_size = rows->nb[1];
    return { n_rows, n_slots, n_hits, n_misses, n_rows * row_size, n_slots * row_size, t_us };
}

//
// graphs that read the cache
//

// The slots of a batch's tokens. They are taken before the graph is built or reused, since only then the batch can still be
// computed as usual.
struct llm_graph_input_firstlayer_slots : llm_graph_input_i {
    llm_graph_input_firstlayer_slots(llama_firstlayer_cache &               cache,
                                     std::shared_ptr<llama_firstlayer_fill> fill,
                                     ggml_backend_t                         backend) :
        cache(cache),
        fill(std::move(fill)),
        backend(backend) {}

    ~llm_graph_input_firstlayer_slots() override {
        wait();
        cache.release(taken);
    }

    bool acquire(const llama_ubatch & ubatch) {
        wait();
        return fill && ubatch.token && cache.acquire(*fill, ubatch.token, ubatch.n_tokens, taken);
    }

    bool can_reuse(const llm_graph_params & params) override { return acquire(params.ubatch) == (slots != nullptr); }

    void set_input(const llama_ubatch *) override {
        if (slots) {
            ggml_backend_tensor_set(slots, taken.data(), 0, ggml_nbytes(slots));
        }
    }

    ggml_tensor * slots = nullptr;  // I32 [n_tokens]; nullptr in a graph that does not read the cache

  private:
    // a device may still be reading the rows of the last batch
    void wait() const {
        if (backend && !taken.empty()) {
            ggml_backend_synchronize(backend);
        }
    }

    llama_firstlayer_cache &               cache;
    std::shared_ptr<llama_firstlayer_fill> fill;
    ggml_backend_t                         backend;  // of the rows, nullptr for the CPU
    std::vector<int32_t>                   taken;
};

// of a model with an encoder and a decoder, rows are those of the decoder
static bool is_other_graph(const llama_model & model, const llm_graph_params & params) {
    return params.gtype == LLM_GRAPH_TYPE_ENCODER && llama_model_has_encoder(&model) && llama_model_has_decoder(&model);
}

bool llama_firstlayer_cache::serves(const llama_model & model, const llm_graph_params & params) const {
    // a callback wants to see every node, as for an importance matrix
    if (is_other_graph(model, params) || params.cparams.cb_eval) {
        return false;
    }
    // weights that are trained change
    ggml_cgraph * gf = templates.front().gf;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        for (const ggml_tensor * src : ggml_graph_node(gf, i)->src) {
            if (src && (src->flags & GGML_TENSOR_FLAG_PARAM)) {
                return false;
            }
        }
    }
    return true;
}

ggml_tensor * llama_firstlayer_cache::add_slots(const llm_graph_params & params) {
    ggml_backend_t backend = nullptr;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(params.sched) - 1; ++i) {
        ggml_backend_t cur = ggml_backend_sched_get_backend(params.sched, i);
        backend            = ggml_backend_get_device(cur) == dev ? cur : backend;
    }

    auto input = std::make_unique<llm_graph_input_firstlayer_slots>(*this, get_fill(params), backend);
    if (llama_firstlayer::is_reserve(params.ubatch) || input->acquire(params.ubatch)) {
        input->slots = ggml_new_tensor_1d(params.res->get_ctx(), GGML_TYPE_I32, params.ubatch.n_tokens);
        ggml_set_input(input->slots);
        ggml_set_name(input->slots, "firstlayer.slots");
    }
    ggml_tensor * res = input->slots;
    params.res->add_input(std::move(input));
    return res;
}

//
// loading
//

// whether all weights that t is computed from are where the CPU computes with them
static bool is_on_cpu(const llama_firstlayer_walk & walk, const ggml_tensor * t) {
    const auto sources = walk.ancestors(t);
    return std::all_of(sources.begin(), sources.end(), [](const ggml_tensor * from) {
        if (!from->buffer || ggml_backend_buffer_is_host(from->buffer)) {
            return true;
        }
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(from->buffer));
        return dev && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
    });
}

void llama_firstlayer::create_cache(llama_model & model) {
    if (model.hparams.no_alloc) {
        return;
    }
    set_weights(model);
    try {
        find_cache_sites(model);
    } catch (const std::exception & err) {
        LLAMA_LOG_WARN("%s: the first layer is computed without a cache: %s\n", __func__, err.what());
        sites.clear();
        tables.clear();
        cache.reset();
    }
    observe = nullptr;
}

void llama_firstlayer::find_cache_sites(llama_model & model) {
    using look_t = std::function<void(const llm_graph_params &, const llama_firstlayer_walk &)>;

    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        throw std::runtime_error("split mode 'tensor' leaves no rows whole");
    }

    const llama_firstlayer_builder builder(model, llama_firstlayer_cache::MAX_FILL);
    const auto                     show = [&](uint32_t n_tokens, const look_t & look) {
        observe = [&](const llm_graph_params & params, const llama_firstlayer_walk & walk) {
            if (!is_other_graph(model, params) && walk.has_batch_tokens()) {
                look(params, walk);
            }
        };
        builder.build(n_tokens, n_tokens);
    };

    std::string blocker = "it only encodes, or replaces token ids";
    int64_t     saved   = 0;
    bool on_cpu = !ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_ACCEL);  // like BLAS, which takes large batches
    show(llama_firstlayer_cache::MAX_FILL, [&](const llm_graph_params &, const llama_firstlayer_walk & walk) {
        llama_firstlayer_walk::tensor_set cut;
        for (ggml_tensor * t : llama_firstlayer_cache::choose_sites(walk)) {
            cut.insert(t);
            const std::string recipe = walk.recipe(t);
            if (std::any_of(sites.begin(), sites.end(), [&](const site & s) { return s.recipe == recipe; })) {
                continue;
            }
            sites.push_back({ ggml_get_name(t), recipe, 0, 0, walk.width(t), false });
            on_cpu = on_cpu && is_on_cpu(walk, t);
        }
        saved   = walk.bytes_saved(cut);
        blocker = walk.blocker();
    });
    show(builder.n_seqs, [&](const llm_graph_params &, const llama_firstlayer_walk & walk) {
        for (const auto & [_, i] : walk.find(sites)) {
            sites[i].used = true;
        }
    });
    sites.erase(std::remove_if(sites.begin(), sites.end(), [](const site & s) { return !s.used; }), sites.end());
    if (sites.empty()) {
        throw std::runtime_error(blocker);
    }

    int64_t width = 0;
    for (auto & site : sites) {
        site.column = width;
        width += GGML_PAD(site.width, 4);  // kernels may read four values at once
    }
    const size_t row_size  = width * sizeof(float);
    size_t       max_bytes = cache_bytes;
    if (cache_bytes == CACHE_AUTO) {
        if (saved <= (int64_t) row_size) {
            throw std::runtime_error("looking up a row would read more than computing it");
        }
        max_bytes = std::min(AUTO_ROWS * row_size, std::max(model.size() / AUTO_SHARE, AUTO_AT_LEAST));
    }
    cache =
        std::make_unique<llama_firstlayer_cache>(model.dev_layer(0), width, model.vocab.n_tokens(), on_cpu, max_bytes);

    for (const uint32_t size : llama_firstlayer_cache::fill_sizes(on_cpu)) {
        bool added = false;
        show(size, [&](const llm_graph_params & params, const llama_firstlayer_walk & walk) {
            added = cache->add_template(params.res->get_ctx(), walk, sites);
            if (added && size == llama_firstlayer_cache::MAX_FILL) {
                cache->keep_equal_sizes(params);
            }
        });
        if (!added) {
            throw std::runtime_error("what its graph computes from the token ids depends on the shape of the batch");
        }
    }
    tables.push_back({ "cache", cache->rows, nullptr });

    const auto data = cache->get_data();
    LLAMA_LOG_WARN("%s: rows of the first layer are cached (%zu sites, up to %" PRId64 " rows in %.1f MiB)\n", __func__,
                   sites.size(), data.n_rows_max, data.n_bytes_max / (double) MIB);
}

int32_t llama_model_firstlayer_get_cache(const llama_model * model, llama_firstlayer_cache_data * data) {
    if (!model->firstlayer || !model->firstlayer->cache) {
        return -1;
    }
    *data = model->firstlayer->cache->get_data();
    return 0;
}

void llama_model_firstlayer_print_cache(const llama_model * model) {
    llama_firstlayer_cache_data data;
    if (llama_model_firstlayer_get_cache(model, &data) != 0) {
        return;
    }
    // a warning, since tools show no information
    LLAMA_LOG_WARN("%s: first layer = %" PRId64 " of %" PRId64 " rows cached (%.1f MiB), %" PRId64 " hits, %" PRId64
                   " misses (%.2f ms)\n",
                   __func__, data.n_rows, data.n_rows_max, data.n_bytes / (double) MIB, data.n_hits, data.n_misses,
                   data.t_us / 1000.0);
}

const char * llama_model_firstlayer_metrics(const llama_model * model) {
    static thread_local std::string res;
    res.clear();

    llama_firstlayer_cache_data data;
    if (!model || llama_model_firstlayer_get_cache(model, &data) != 0) {
        return res.c_str();
    }
    const auto add = [](const char * name, const char * type, const char * help, double value) {
        res += format("# HELP llamacpp:firstlayer_cache_%s %s\n# TYPE llamacpp:firstlayer_cache_%s %s\n", name, help,
                      name, type);
        res += format("llamacpp:firstlayer_cache_%s %.17g\n", name, value);
    };
    add("hits_total", "counter", "Tokens whose first-layer row was cached", data.n_hits);
    add("misses_total", "counter", "First-layer rows computed", data.n_misses);
    add("seconds_total", "counter", "Total time spent computing first-layer rows", data.t_us / 1e6);
    add("rows", "gauge", "First-layer rows cached", data.n_rows);
    add("bytes", "gauge", "Memory of the cached first-layer rows", data.n_bytes);
    return res.c_str();
}
