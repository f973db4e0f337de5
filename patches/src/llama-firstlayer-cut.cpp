#include "llama-firstlayer-walk.h"

#include <algorithm>
#include <cstdlib>
#include <queue>
#include <random>

//
// cut
//

// A chain of row-pure nodes can be cut in many places: the part above the cut comes from tables, the part below is computed
// from them. The sites are a minimum cut between the weights and the impure nodes, with these costs per token:
//
//   - a table:            the bytes of its row, and a share of its memory
//   - a node that stays:  the weights it reads, as stored
//
// The share of its memory keeps a large table from replacing a small product, such as one that absorbs a head's key
// projection: a table must save a byte per token for every MEMORY_PER_BYTE bytes it takes.
static const int64_t MEMORY_PER_BYTE = 512;

// The first product on each path is always replaced, since otherwise there is nothing to gain
static const int64_t COST_FIRST_PRODUCT = INT64_MAX / 1024;
static const int64_t COST_INFINITE      = INT64_MAX / 2;

namespace {

// maximum flow by shortest augmenting paths (Edmonds, Karp)
struct flow_network {
    struct edge {
        int     to;
        int64_t capacity;  // remaining; the reverse edge is at index ^ 1
    };

    explicit flow_network(int n_nodes) : edges_of(n_nodes) {}

    void add(int from, int to, int64_t capacity) {
        edges_of[from].push_back(edges.size());
        edges.push_back({ to, capacity });
        edges_of[to].push_back(edges.size());
        edges.push_back({ from, 0 });
    }

    bool augment(int source, int sink) {
        std::vector<int> via(edges_of.size(), -1);
        std::queue<int>  queue({ source });
        while (!queue.empty() && via[sink] < 0) {
            const int cur = queue.front();
            queue.pop();
            for (const int e : edges_of[cur]) {
                if (edges[e].capacity > 0 && via[edges[e].to] < 0 && edges[e].to != source) {
                    via[edges[e].to] = e;
                    queue.push(edges[e].to);
                }
            }
        }
        if (via[sink] < 0) {
            return false;
        }

        int64_t amount = COST_INFINITE;
        for (int cur = sink; cur != source; cur = edges[via[cur] ^ 1].to) {
            amount = std::min(amount, edges[via[cur]].capacity);
        }
        for (int cur = sink; cur != source; cur = edges[via[cur] ^ 1].to) {
            edges[via[cur]].capacity -= amount;
            edges[via[cur] ^ 1].capacity += amount;
        }
        return true;
    }

    // the nodes on the sink's side of the minimum cut that is nearest to it
    std::vector<bool> sink_side(int source, int sink) {
        while (augment(source, sink)) {
        }
        std::vector<bool> res(edges_of.size(), false);
        std::queue<int>   queue({ sink });
        res[sink] = true;
        while (!queue.empty()) {
            const int cur = queue.front();
            queue.pop();
            for (const int e : edges_of[cur]) {
                if (edges[e ^ 1].capacity > 0 && !res[edges[e].to]) {
                    res[edges[e].to] = true;
                    queue.push(edges[e].to);
                }
            }
        }
        return res;
    }

    std::vector<edge>             edges;
    std::vector<std::vector<int>> edges_of;
};

}  // namespace

// bytes of constants that a row-pure node reads for one token
int64_t llama_firstlayer_walk::bytes_read(const ggml_tensor * t) const {
    int64_t res = 0;
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (t->src[i] && get(t->src[i]).kind == PURITY_CONSTANT) {
            const use cur = make_use(t, i);
            res += ggml_nbytes(cur.operand) / cur.n_slices * cur.n_used;
        }
    }
    return res;
}

int64_t llama_firstlayer_walk::bytes_saved(const tensor_set & cut) const {
    const tensor_set is_live = live(cut);

    int64_t res = 0;
    for (const ggml_tensor * t : nodes) {
        if (get(t).kind == PURITY_PURE && (!is_live.count(t) || cut.count(t))) {
            res += bytes_read(t);
        }
    }
    return res;
}

// for tests: a quarter of all that a file could name, at random
static std::vector<ggml_tensor *> sample(std::vector<ggml_tensor *> sites, const char * seed) {
    std::mt19937 random(atoi(seed));
    sites.erase(std::remove_if(sites.begin(), sites.end(), [&](const ggml_tensor *) { return random() % 4 != 0; }),
                sites.end());
    return sites;
}

std::vector<ggml_tensor *> llama_firstlayer_walk::sites(int64_t n_rows, int64_t bytes_per_value) const {
    if (const char * seed = getenv("LLAMA_FIRSTLAYER_SAMPLE_SITES")) {
        return sample(possible_sites(), seed);
    }

    std::unordered_map<const ggml_tensor *, int> index;
    std::vector<ggml_tensor *>                   pure;
    for (ggml_tensor * t : nodes) {
        if (get(t).kind == PURITY_PURE && (t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            index[t] = pure.size();
            pure.push_back(t);
        }
    }

    // two nodes for each row-pure tensor: the first is on the sink's side if the tensor is computed at run time, the second
    // if it is needed at run time
    const int    source = 2 * pure.size();
    const int    sink   = source + 1;
    flow_network net(sink + 1);

    const auto is_computed = [&](int i) {
        return 2 * i;
    };
    const auto is_needed = [&](int i) {
        return 2 * i + 1;
    };

    for (int i = 0; i < (int) pure.size(); ++i) {
        ggml_tensor * t = pure[i];

        bool first_product = get(t).product;
        for (const ggml_tensor * src : t->src) {
            first_product = first_product && !(src && get(src).kind == PURITY_PURE && get(src).product);

            const auto it = index.find(src);
            if (it != index.end()) {
                net.add(is_needed(it->second), is_computed(i), COST_INFINITE);
            }
        }

        // in units of 1/(4*MEMORY_PER_BYTE) bytes per token; the lowest bits prefer a row to views of all its parts, and
        // views to copies, which depend on the layout that the attention needs
        const auto &  op   = llama_firstlayer_get_op(t);
        const int64_t move = op.is(LLAMA_FIRSTLAYER_OP_LAYOUT) ? 1 : op.is(LLAMA_FIRSTLAYER_OP_COPY) ? 2 : 0;
        const int64_t row  = 4 * width(t) * bytes_per_value * (MEMORY_PER_BYTE + n_rows) + move;
        net.add(source, is_computed(i), first_product ? COST_FIRST_PRODUCT : 4 * MEMORY_PER_BYTE * bytes_read(t));
        net.add(is_computed(i), is_needed(i), can_be_site(t) ? row : COST_INFINITE);
        if (t->flags & GGML_TENSOR_FLAG_OUTPUT) {
            net.add(is_needed(i), sink, COST_INFINITE);
        }
    }
    for (ggml_tensor * t : nodes) {
        if (get(t).kind != PURITY_IMPURE || !(t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            continue;
        }
        for (const ggml_tensor * src : t->src) {
            const auto it = index.find(src);
            if (it != index.end()) {
                net.add(is_needed(it->second), sink, COST_INFINITE);
            }
        }
    }

    const auto on_sink_side = net.sink_side(source, sink);

    std::vector<ggml_tensor *> res;
    for (int i = 0; i < (int) pure.size(); ++i) {
        if (on_sink_side[is_needed(i)] && !on_sink_side[is_computed(i)]) {
            res.push_back(pure[i]);
        }
    }
    return res;
}
