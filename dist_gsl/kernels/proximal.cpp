// The proximal step of layers on a CPU, one neuron after another: its norm, and while its row is still in cache its shrinking. Memory is
// read once and written once, which is what a copy costs.
//
// Called by address (see __init__.py). Sums run over fixed lanes, so that the same bits come out whatever the vector width, the number of
// threads, or the neuron's place; compiled without contraction to fused multiply-adds for the same reason.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)  // where functions are chosen when they are loaded
#define VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORS
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))  // into each of those functions
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

namespace {

// What the neurons of a layer own of one tensor; entries are counted, not bytes. Neuron n has `positions` places `stride` apart from the
// tensor's start: the n-th where `index` is null (there is one then), or else those that row n of `index` names. From each place on it
// has `blocks` runs of `run` neighbouring entries.
struct Part {
    void* data;
    const int64_t* index;
    uint64_t positions, stride, blocks, block_stride, run;
};

// A layer, what is asked of it, and what came of it.
struct Layer {
    const Part* parts;
    uint64_t num_parts, num_neurons, entries;  // entries of one neuron
    uint64_t min_alive;
    double cut, threshold;
    void* factors;  // out, one a neuron of the parts' type: what it was multiplied with, 0 for the dying
    uint64_t num_zero;  // out: how many are dying. They are zero now, unless fewer than min_alive would be left: they are as they were then.
};

constexpr uint64_t LANES = 64;  // four registers of the widest kind
constexpr uint64_t FEW_LANES = 8;
constexpr uint64_t CHUNK = 4096;  // entries between two sums in double: lanes add few enough terms to stay as exact as pairwise sums

template <typename T>
ALWAYS_INLINE T soft(T x, T cut) {
    return x - std::min(std::max(x, -cut), cut);  // exactly 0 within [-cut, cut]; NaN stays NaN
}

// Sum of the squares of a run after soft-thresholding: entry i goes to lane i % LANES, then lanes are summed pairwise.
template <typename T, bool IS_CUT>
ALWAYS_INLINE double squares(const T* x, uint64_t size, T cut) {
    if (size == 1) {  // a bias, or of a BatchNorm pair
        const T s = IS_CUT ? soft(x[0], cut) : x[0];
        return s * s;
    }
    if (size < LANES) {  // fewer lanes, which stay in a register
        T lanes[FEW_LANES] = {}, rest = 0;
        uint64_t i = 0;
        for (; i + FEW_LANES <= size; i += FEW_LANES)
            for (uint64_t k = 0; k < FEW_LANES; ++k) {
                const T s = IS_CUT ? soft(x[i + k], cut) : x[i + k];
                lanes[k] += s * s;
            }
        for (; i < size; ++i) {
            const T s = IS_CUT ? soft(x[i], cut) : x[i];
            rest += s * s;
        }
        for (uint64_t width = FEW_LANES / 2; width > 0; width /= 2)
            for (uint64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
        return lanes[0] + rest;
    }
    double total = 0;
    for (uint64_t begin = 0; begin < size; begin += CHUNK) {
        const uint64_t end = std::min(size, begin + CHUNK);
        T lanes[LANES] = {};
        uint64_t i = begin;
        for (; i + LANES <= end; i += LANES)
            for (uint64_t k = 0; k < LANES; ++k) {
                const T s = IS_CUT ? soft(x[i + k], cut) : x[i + k];
                lanes[k] += s * s;
            }
        for (uint64_t k = 0; i + k < end; ++k) {
            const T s = IS_CUT ? soft(x[i + k], cut) : x[i + k];
            lanes[k] += s * s;
        }
        for (uint64_t width = LANES / 2; width > 0; width /= 2)
            for (uint64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
        total += lanes[0];
    }
    return total;
}

// Entry 0 of the k-th place of a neuron.
template <typename T>
ALWAYS_INLINE T* place(const Part& part, uint64_t n, uint64_t k) {
    return static_cast<T*>(part.data) + (part.index ? static_cast<uint64_t>(part.index[n * part.positions + k]) : n) * part.stride;
}

template <typename T, typename F>
ALWAYS_INLINE void for_each_run(const Layer& layer, uint64_t n, F&& use) {
    for (const Part* part = layer.parts; part < layer.parts + layer.num_parts; ++part)
        for (uint64_t k = 0; k < part->positions; ++k) {
            T* first = place<T>(*part, n, k);
            for (uint64_t b = 0; b < part->blocks; ++b) use(first + b * part->block_stride, part->run);
        }
}

// A neuron's entries times its factor. The next neuron's are asked for on the way, so that memory is busy while this one is computed.
template <typename T, bool IS_CUT>
ALWAYS_INLINE void scale(const Layer& layer, uint64_t n, uint64_t next, T cut, T factor) {
    constexpr uint64_t LINE = 64 / sizeof(T);
    for (const Part* part = layer.parts; part < layer.parts + layer.num_parts; ++part)
        for (uint64_t k = 0; k < part->positions; ++k) {
            T* first = place<T>(*part, n, k);
            const T* after = place<T>(*part, next, k);
            for (uint64_t b = 0; b < part->blocks; ++b) {
                T* x = first + b * part->block_stride;
                const T* ahead = after + b * part->block_stride;
                uint64_t i = 0;
                for (; i + 4 * LINE <= part->run; i += 4 * LINE) {
                    for (uint64_t l = 0; l < 4; ++l) __builtin_prefetch(ahead + i + l * LINE);
                    for (uint64_t j = i; j < i + 4 * LINE; ++j) x[j] = (IS_CUT ? soft(x[j], cut) : x[j]) * factor;
                }
                for (; i < part->run; ++i) x[i] = (IS_CUT ? soft(x[i], cut) : x[i]) * factor;
            }
        }
}

// Neurons begin to end: factors of all; those whose factor is not 0 are shrunk, the others left as they are. Returns how many others.
template <typename T, bool IS_CUT>
ALWAYS_INLINE uint64_t shrink_by(const Layer& layer, uint64_t begin, uint64_t end) {
    const T cut = static_cast<T>(layer.cut), threshold = static_cast<T>(layer.threshold);
    T* factors = static_cast<T*>(layer.factors);
    uint64_t num_zero = 0;
    for (uint64_t n = begin; n < end; ++n) {
        double total = 0;
        for_each_run<T>(layer, n, [&](const T* x, uint64_t run) ALWAYS_INLINE_LAMBDA { total += squares<T, IS_CUT>(x, run, cut); });
        const T norm = static_cast<T>(std::sqrt(total));
        const T factor = norm <= threshold ? T(0) : (norm - threshold) / norm;  // NaN stays NaN
        factors[n] = factor;
        if (factor == 0) {
            ++num_zero;
            continue;
        }
        scale<T, IS_CUT>(layer, n, std::min(n + 1, end - 1), cut, factor);
    }
    return num_zero;
}

// One function for each type, so that the choice of a processor's version is made once for all neurons.
VECTORS uint64_t shrink(const Layer& layer, uint64_t begin, uint64_t end, float) {
    return layer.cut > 0 ? shrink_by<float, true>(layer, begin, end) : shrink_by<float, false>(layer, begin, end);
}
VECTORS uint64_t shrink(const Layer& layer, uint64_t begin, uint64_t end, double) {
    return layer.cut > 0 ? shrink_by<double, true>(layer, begin, end) : shrink_by<double, false>(layer, begin, end);
}

struct Task {
    uint64_t layer, begin, end;
};

template <typename T>
void shrink_all(Layer* layers, uint64_t num_layers, uint64_t num_threads, uint64_t entries_per_task) {
    std::vector<Task> tasks;
    for (uint64_t l = 0; l < num_layers; ++l) {
        layers[l].num_zero = 0;
        const uint64_t share = num_threads < 2 ? layers[l].num_neurons : std::max<uint64_t>(1, entries_per_task / std::max<uint64_t>(1, layers[l].entries));
        for (uint64_t begin = 0; begin < layers[l].num_neurons; begin += share)
            tasks.push_back({l, begin, std::min(begin + share, layers[l].num_neurons)});
    }
    std::atomic<uint64_t> next{0};
    const auto work = [&] {
        for (uint64_t number; (number = next++) < tasks.size();) {
            const Task& task = tasks[number];
            const uint64_t num_zero = shrink(layers[task.layer], task.begin, task.end, T());
            if (num_zero) __atomic_fetch_add(&layers[task.layer].num_zero, num_zero, __ATOMIC_RELAXED);
        }
    };
    std::vector<std::thread> others;
    try {
        for (uint64_t k = 1; k < num_threads; ++k) others.emplace_back(work);
    } catch (...) {  // the system has no thread left: what nobody else does is done here
    }
    work();
    for (std::thread& other : others) other.join();
    for (Layer* layer = layers; layer < layers + num_layers; ++layer) {
        if (layer->num_zero == 0 || layer->num_neurons - layer->num_zero < layer->min_alive) continue;
        for (uint64_t n = 0; n < layer->num_neurons; ++n)
            if (static_cast<const T*>(layer->factors)[n] == 0)
                for_each_run<T>(*layer, n, [](T* x, uint64_t run) { std::fill(x, x + run, T(0)); });
    }
}

}  // namespace

extern "C" {

int32_t dist_gsl_proximal_version() { return 3; }

void dist_gsl_shrink_float(Layer* layers, uint64_t num_layers, uint64_t num_threads, uint64_t entries_per_task) noexcept {
    shrink_all<float>(layers, num_layers, num_threads, entries_per_task);
}

void dist_gsl_shrink_double(Layer* layers, uint64_t num_layers, uint64_t num_threads, uint64_t entries_per_task) noexcept {
    shrink_all<double>(layers, num_layers, num_threads, entries_per_task);
}
}
