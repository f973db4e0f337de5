#include "llama-firstlayer-cache.h"

#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

// those of all loaded models, for metrics
static std::mutex                                         all_mutex;
static std::unordered_set<const llama_firstlayer_cache *> all;

//
// cache
//

std::vector<uint32_t> llama_firstlayer_cache::fill_sizes(bool on_cpu) {
    return on_cpu ? std::vector<uint32_t>{ 1, 2, 4, 8, 16, 32, MAX_FILL } : std::vector<uint32_t>{ MAX_FILL };
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
        throw std::runtime_error(format("cannot allocate %zu bytes", ggml_nbytes(rows)));
    }
    ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    slots.reserve(n_slots);

    const std::lock_guard<std::mutex> lock(all_mutex);
    all.insert(this);
}

llama_firstlayer_cache::~llama_firstlayer_cache() {
    const std::lock_guard<std::mutex> lock(all_mutex);
    all.erase(this);
}

bool llama_firstlayer_cache::add_up(llama_firstlayer_cache_data & sum) {
    const std::lock_guard<std::mutex> lock(all_mutex);
    for (const auto * cache : all) {
        const auto data = cache->get_data();
        sum.n_rows += data.n_rows;
        sum.n_rows_max += data.n_rows_max;
        sum.n_hits += data.n_hits;
        sum.n_misses += data.n_misses;
        sum.n_bytes += data.n_bytes;
        sum.n_bytes_max += data.n_bytes_max;
        sum.t_us += data.t_us;
    }
    return !all.empty();
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
        for (const ggml_tensor * t : walk.ancestors(found[i])) {
            n_tensors++;
            if (t->buffer) {
                weights.insert(t);
            }
        }

        ggml_tensor * columns =
            ggml_view_2d(ctx, rows, site.width, rows->ne[1], rows->nb[1], site.column * sizeof(float));
        roots.push_back(ggml_set_rows(ctx, columns, walk.as_rows(ctx, found[i]), slots));
    }
    templates.push_back(llama_firstlayer_fill_graph::copy(roots, walk.tokens(), slots, n_tensors));
    return true;
}

bool llama_firstlayer_cache::is_trained() const {
    return std::any_of(weights.begin(), weights.end(),
                       [](const ggml_tensor * t) { return t->flags & GGML_TENSOR_FLAG_PARAM; });
}

void llama_firstlayer_cache::keep_equal_sizes(const llm_graph_params & params) {
    std::vector<llama_token> tokens;
    std::vector<int32_t>     places;
    for (int32_t i = 0; i < std::min<int32_t>({ n_slots, (int32_t) slot_of.size(), N_TRIED }); ++i) {
        tokens.push_back(i * (slot_of.size() / N_TRIED));
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

    if (templates.size() == 1) {
        return;
    }
    const auto expected = rows_of(templates.size() - 1);
    for (size_t i = templates.size() - 1; i-- > 0;) {
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

void llama_firstlayer_cache::release(llama_firstlayer_fill & fill) {
    const std::lock_guard<std::mutex> lock(mutex);
    unpin(fill.taken);
}

void llama_firstlayer_cache::count(llama_firstlayer_fill & fill) {
    const std::lock_guard<std::mutex> lock(mutex);
    n_hits += std::max<int64_t>(0, fill.taken.size() - fill.n_missing);
    n_misses += fill.n_missing;
    fill.n_missing = 0;
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

bool llama_firstlayer_cache::acquire(llama_firstlayer_fill & fill, const llama_token * tokens, uint32_t n_tokens) {
    const std::lock_guard<std::mutex> lock(mutex);

    std::vector<int32_t> & taken = fill.taken;
    unpin(taken);

    // first those that are there, so that they are not evicted
    std::vector<llama_token> missing;
    std::vector<int32_t>     slots_missing;
    missing.reserve(n_tokens);  // nothing may fail while tokens are marked
    slots_missing.reserve(n_tokens);
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
        bool          ok    = false;
        try {
            ok = fill.compute(missing, slots_missing, n_slots);
        } catch (const std::exception & err) {
            LLAMA_LOG_WARN("%s: rows of a batch cannot be cached: %s\n", __func__, err.what());
        }
        t_us += ggml_time_us() - start;

        unpin(slots_missing);
        if (ok) {
            fill.n_missing += missing.size();
            return true;
        }
    }
    if (missing.empty()) {
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
        if (fill && fill->reader == this) {
            wait();
            cache.release(*fill);
        }
    }

    // instead of those that another graph of the context may have, since only the last one that ran is used again
    bool acquire(const llama_ubatch & ubatch) {
        if (!fill || !ubatch.token) {
            return false;
        }
        wait();
        fill->reader = this;
        return cache.acquire(*fill, ubatch.token, ubatch.n_tokens);
    }

    bool can_reuse(const llm_graph_params & params) override {
        return !cache.is_trained() && acquire(params.ubatch) == (slots != nullptr);
    }

    void set_input(const llama_ubatch *) override {
        if (slots) {
            ggml_backend_tensor_set(slots, fill->taken.data(), 0, ggml_nbytes(slots));
            cache.count(*fill);
        }
    }

    ggml_tensor * slots = nullptr;  // I32 [n_tokens]; nullptr in a graph that does not read the cache

  private:
    // a device may still be reading the rows of the last batch
    void wait() const {
        if (backend && !fill->taken.empty()) {
            ggml_backend_synchronize(backend);
        }
    }

    llama_firstlayer_cache &               cache;
    std::shared_ptr<llama_firstlayer_fill> fill;
    ggml_backend_t                         backend;  // of the rows, nullptr for the CPU
};

bool llama_firstlayer_cache::is_other_graph(const llama_model & model, const llm_graph_params & params) {
    return params.gtype == LLM_GRAPH_TYPE_ENCODER && llama_model_has_encoder(&model) && llama_model_has_decoder(&model);
}

bool llama_firstlayer_cache::serves(const llama_model & model, const llm_graph_params & params) const {
    // a callback wants to see every node, as for an importance matrix
    return !is_other_graph(model, params) && !params.cparams.cb_eval && !is_trained();
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
