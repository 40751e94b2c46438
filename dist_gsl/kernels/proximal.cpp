// The proximal step of a layer on a CPU, one neuron after another: its norm, and while its row is still in cache its shrinking. Memory is
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

namespace {

// What the neurons of a layer own of one tensor. Neuron n has `blocks` runs of `run` neighbouring entries; entries are counted, not bytes.
struct Part {
    void* data;
    uint64_t neuron_stride, blocks, block_stride, run;
};

constexpr uint64_t LANES = 64;  // four registers of the widest kind
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
        uint64_t width = LANES / 2;
        while (width >= end - begin) width /= 2;  // lanes from there on are 0
        for (; width > 0; width /= 2)
            for (uint64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
        total += lanes[0];
    }
    return total;
}

// Neurons begin to end: factors of all; those whose factor is not 0 are shrunk, the others left as they are. Returns how many others.
template <typename T, bool IS_CUT>
ALWAYS_INLINE uint64_t shrink_by(const Part* parts, uint64_t num_parts, uint64_t begin, uint64_t end, T cut, T threshold, T* factors) {
    uint64_t num_zero = 0;
    for (uint64_t n = begin; n < end; ++n) {
        double total = 0;
        for (const Part* part = parts; part < parts + num_parts; ++part) {
            const T* row = static_cast<const T*>(part->data) + n * part->neuron_stride;
            for (uint64_t b = 0; b < part->blocks; ++b) total += squares<T, IS_CUT>(row + b * part->block_stride, part->run, cut);
        }
        const T norm = static_cast<T>(std::sqrt(total));
        const T factor = norm <= threshold ? T(0) : (norm - threshold) / norm;  // NaN stays NaN
        factors[n] = factor;
        if (factor == 0) {
            ++num_zero;
            continue;
        }
        for (const Part* part = parts; part < parts + num_parts; ++part) {
            T* row = static_cast<T*>(part->data) + n * part->neuron_stride;
            for (uint64_t b = 0; b < part->blocks; ++b) {
                T* x = row + b * part->block_stride;
                for (uint64_t i = 0; i < part->run; ++i) x[i] = (IS_CUT ? soft(x[i], cut) : x[i]) * factor;
            }
        }
    }
    return num_zero;
}

// One function for each type, so that the choice of a processor's version is made once for all neurons.
VECTORS uint64_t shrink(const Part* parts, uint64_t num_parts, uint64_t begin, uint64_t end, float cut, float threshold, float* factors) {
    return cut > 0 ? shrink_by<float, true>(parts, num_parts, begin, end, cut, threshold, factors)
                   : shrink_by<float, false>(parts, num_parts, begin, end, cut, threshold, factors);
}
VECTORS uint64_t shrink(const Part* parts, uint64_t num_parts, uint64_t begin, uint64_t end, double cut, double threshold, double* factors) {
    return cut > 0 ? shrink_by<double, true>(parts, num_parts, begin, end, cut, threshold, factors)
                   : shrink_by<double, false>(parts, num_parts, begin, end, cut, threshold, factors);
}

template <typename T>
uint64_t shrink_all(const Part* parts, uint64_t num_parts, uint64_t num_neurons, T cut, T threshold, T* factors, uint64_t num_threads) {
    const uint64_t share = (num_neurons + num_threads - 1) / num_threads;
    std::atomic<uint64_t> num_zero{0};
    std::vector<std::thread> others;
    uint64_t begin = 0;  // what nobody else does is done here
    try {
        others.reserve(num_threads);
        for (; begin + share < num_neurons; begin += share)
            others.emplace_back([=, &num_zero] { num_zero += shrink(parts, num_parts, begin, begin + share, cut, threshold, factors); });
    } catch (...) {  // the system has no thread left
    }
    num_zero += shrink(parts, num_parts, begin, num_neurons, cut, threshold, factors);
    for (std::thread& other : others) other.join();
    return num_zero;
}

}  // namespace

extern "C" {

int32_t dist_gsl_proximal_version() { return 2; }

uint64_t dist_gsl_shrink_float(const Part* parts, uint64_t num_parts, uint64_t num_neurons, double cut, double threshold, float* factors,
                               uint64_t num_threads) noexcept {
    return shrink_all<float>(parts, num_parts, num_neurons, static_cast<float>(cut), static_cast<float>(threshold), factors, num_threads);
}

uint64_t dist_gsl_shrink_double(const Part* parts, uint64_t num_parts, uint64_t num_neurons, double cut, double threshold, double* factors,
                                uint64_t num_threads) noexcept {
    return shrink_all<double>(parts, num_parts, num_neurons, cut, threshold, factors, num_threads);
}
}
