// Decodes a batch of a beton's colour images: the wanted region only, resized, mirrored, checked.
//
// A JPEG is decoded from the top of the region to its bottom: rows above are skipped without their inverse transform, rows
// below are never read, columns outside are left out. With a pixel more on each side the result is, bit for bit, the region
// of the whole decoded image. Where the region is at least twice the output in both directions, it is decoded at half the
// scale, a quarter, an eighth, which the transform gives for less. Resizing is by the triangle filter whose support grows
// with the reduction, as in Pillow and in torchvision with antialias.
//
// Plain C functions, called through ctypes and numba; no Python inside, so any number of threads may run.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

extern "C" {
#include <jpeglib.h>
#include <libdeflate.h>
}

namespace {

enum Status : int32_t { kGood = 0, kOutside = 1, kChecksum = 2, kBadJpeg = 3, kWrongSize = 4, kNotRgb = 5 };
enum Mode : uint8_t { kJpeg = 0, kRaw = 1 };  // as FFCV numbers them

// How the region of an image is chosen. The same numbers as in `__init__.py`.
enum Crop : uint64_t { kCentre = 0, kCropFlip = 1, kRandomResized = 2 };

#pragma pack(push, 1)
struct Row {  // FFCV's metadata of an RGB image
    uint8_t mode;
    uint16_t width, height;
    uint64_t offset;
};
#pragma pack(pop)

struct Settings {
    uint64_t crop, seed, epoch, size, num_threads;
    // Where in a row its checksum is (0: nowhere, nothing is verified), and the address of its target (0: it is in the row),
    // of so many bytes.
    uint64_t checksum_offset, target_offset, target_bytes;
    uint64_t out;                 // address of the batch, or 0
    double share;                 // of the shorter side, that the central square has
    double min_area, max_area;    // shares of the image's area
    double min_ratio, max_ratio;  // width / height
};

struct Region {
    uint32_t x, y, width, height;
    bool mirrored;
};

// --- random numbers: SplitMix64's finaliser over seed, epoch, number of the draw, and sample, as in `augment.py`

uint64_t mixed(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return bits ^ (bits >> 31);
}

uint64_t hashed(const Settings& settings, uint64_t sample, uint64_t draw) {
    constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
    uint64_t bits = 0;
    for (uint64_t word : {settings.seed, settings.epoch, draw, sample}) bits = mixed(bits + word + golden);
    return bits;
}

double uniform(const Settings& settings, uint64_t sample, uint64_t draw) {  // in [0, 1)
    return static_cast<double>(hashed(settings, sample, draw) >> 11) * 0x1p-53;
}

uint32_t below(uint32_t bound, const Settings& settings, uint64_t sample, uint64_t draw) {  // 0 .. bound - 1
    return static_cast<uint32_t>((hashed(settings, sample, draw) >> 32) * bound >> 32);
}

// --- regions

Region centre(const Settings& settings, uint32_t width, uint32_t height) {
    const uint32_t side = std::max<uint32_t>(1, static_cast<uint32_t>(settings.share * std::min(width, height)));
    return {(width - side) / 2, (height - side) / 2, side, side, false};
}

Region crop_flip(const Settings& settings, uint64_t sample, uint32_t width, uint32_t height) {
    const uint32_t shorter = std::min(width, height);
    const uint32_t side = std::max<uint32_t>(1, static_cast<uint32_t>(settings.share * shorter));
    const uint32_t top = below(shorter - side + 1, settings, sample, 0), left = below(shorter - side + 1, settings, sample, 1);
    const bool mirrored = below(2, settings, sample, 2) != 0;
    return {(width - shorter) / 2 + left, (height - shorter) / 2 + top, side, side, mirrored};
}

// torchvision's RandomResizedCrop, drawn from hashes: ten attempts, then the largest central region of an allowed shape.
Region random_resized(const Settings& settings, uint64_t sample, uint32_t width, uint32_t height) {
    const double area = static_cast<double>(width) * height;
    const double low = std::log(settings.min_ratio), high = std::log(settings.max_ratio);
    const bool mirrored = below(2, settings, sample, 2) != 0;
    for (uint64_t attempt = 0; attempt < 10; ++attempt) {
        const uint64_t draw = 4 * (attempt + 1);
        const double target =
            area * (settings.min_area + (settings.max_area - settings.min_area) * uniform(settings, sample, draw));
        const double ratio = std::exp(low + (high - low) * uniform(settings, sample, draw + 1));
        const auto w = static_cast<uint32_t>(std::lrint(std::sqrt(target * ratio)));
        const auto h = static_cast<uint32_t>(std::lrint(std::sqrt(target / ratio)));
        if (w >= 1 && w <= width && h >= 1 && h <= height) {
            return {below(width - w + 1, settings, sample, draw + 2), below(height - h + 1, settings, sample, draw + 3), w, h,
                    mirrored};
        }
    }
    uint32_t w = width, h = height;
    const double ratio = static_cast<double>(width) / height;
    if (ratio < settings.min_ratio) h = std::max<uint32_t>(1, static_cast<uint32_t>(std::lrint(w / settings.min_ratio)));
    if (ratio > settings.max_ratio) w = std::max<uint32_t>(1, static_cast<uint32_t>(std::lrint(h * settings.max_ratio)));
    return {(width - w) / 2, (height - h) / 2, w, h, mirrored};
}

Region region_of(const Settings& settings, uint64_t sample, uint32_t width, uint32_t height) {
    switch (settings.crop) {
        case kCropFlip: return crop_flip(settings, sample, width, height);
        case kRandomResized: return random_resized(settings, sample, width, height);
        default: return centre(settings, width, height);
    }
}

// --- JPEG

struct Failure {
    jpeg_error_mgr manager;
    std::jmp_buf jump;
};

[[noreturn]] void fail(j_common_ptr info) { std::longjmp(reinterpret_cast<Failure*>(info->err)->jump, 1); }

void count_warning(j_common_ptr info, int level) {
    if (level < 0) ++info->err->num_warnings;
}

void say_nothing(j_common_ptr) {}

// libjpeg's errors go to `failure.jump`; what it warns of is counted.
jpeg_error_mgr* handled_by(Failure& failure) {
    jpeg_error_mgr* manager = jpeg_std_error(&failure.manager);
    manager->error_exit = fail;
    manager->emit_message = count_warning;
    manager->output_message = say_nothing;
    return manager;
}

constexpr size_t kMargin = 64;  // bytes that wide loads and stores may touch behind the last ones that count

// For each output of one direction, where its inputs begin and their weights, `taps` of them, zeros at the end.
struct Filter {
    int taps;
    std::vector<int32_t> first;
    std::vector<int16_t> weights;
};

// What a thread keeps between images.
struct Scratch {
    std::vector<uint8_t> pixels, row;
    std::vector<double> exact;
    std::vector<int16_t> spread;
    Filter vertical, horizontal;
};

// Where the pixels of a region are: `scale` of the image's own pixels go into one of these.
struct Pixels {
    const uint8_t* data;
    uint32_t width, height;
    size_t stride;
    double left, top, right, bottom;  // the region within them
};

constexpr uint32_t kLines = 8;  // read at once

Status decode_jpeg(const uint8_t* data, uint64_t num_bytes, const Row& row, const Region& region, uint32_t size, Scratch& scratch,
                   Pixels& pixels) {
    jpeg_decompress_struct info;
    Failure failure;
    info.err = handled_by(failure);
    if (setjmp(failure.jump)) {  // nothing below may own memory: it would not be freed
        jpeg_destroy_decompress(&info);
        return kBadJpeg;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, const_cast<uint8_t*>(data), num_bytes);
    jpeg_read_header(&info, TRUE);
    if (info.image_width != row.width || info.image_height != row.height) {
        jpeg_destroy_decompress(&info);
        return kWrongSize;
    }
    if (info.jpeg_color_space != JCS_YCbCr && info.jpeg_color_space != JCS_RGB && info.jpeg_color_space != JCS_GRAYSCALE) {
        jpeg_destroy_decompress(&info);
        return kNotRgb;
    }
    uint32_t scale = 1;
    while (scale < 8 && region.width >= 2 * scale * size && region.height >= 2 * scale * size) scale *= 2;
    info.out_color_space = JCS_RGB;
    info.scale_num = 1;
    info.scale_denom = scale;
    jpeg_start_decompress(&info);

    // A pixel more on each side, of which the decoder interpolates chroma; then outwards to whole pixels of the scale.
    const uint32_t left = region.x / scale, top = region.y / scale;
    const uint32_t right = std::min<uint32_t>(info.output_width, (region.x + region.width + scale - 1) / scale);
    const uint32_t bottom = std::min<uint32_t>(info.output_height, (region.y + region.height + scale - 1) / scale);
    JDIMENSION start = left > 0 ? left - 1 : 0, width = std::min<uint32_t>(info.output_width, right + 1) - start;
    if (width < info.output_width) jpeg_crop_scanline(&info, &start, &width);  // it moves both to whole blocks
    const size_t stride = size_t{3} * info.output_width;
    pixels = {scratch.pixels.data() + size_t{3} * (left - start), right - left, bottom - top, stride,
              static_cast<double>(region.x) / scale - left, static_cast<double>(region.y) / scale - top,
              static_cast<double>(region.x + region.width) / scale - left,
              static_cast<double>(region.y + region.height) / scale - top};
    if (top > 0) jpeg_skip_scanlines(&info, top);
    JSAMPROW lines[kLines];
    for (uint32_t y = top; y < bottom;) {
        const uint32_t wanted = std::min(kLines, bottom - y);
        for (uint32_t i = 0; i < wanted; ++i) lines[i] = scratch.pixels.data() + (y - top + i) * stride;
        const uint32_t done = jpeg_read_scanlines(&info, lines, wanted);
        if (done == 0) break;
        y += done;
    }
    const bool is_bad = info.err->num_warnings > 0 || info.output_scanline < bottom;
    jpeg_abort_decompress(&info);
    jpeg_destroy_decompress(&info);
    return is_bad ? kBadJpeg : kGood;
}

// --- resizing

constexpr int kBits = 14;  // of a weight: 1.0 fits 16 bits with its sign, and any sum 32
constexpr int32_t kHalf = 1 << (kBits - 1);

// The triangle filter from inputs [low, high) of `num_inputs` to `size` outputs; mirrored: the last output first.
void make_filter(double low, double high, uint32_t num_inputs, uint32_t size, bool mirrored, Filter& filter, std::vector<double>& exact) {
    const double scale = (high - low) / size, support = std::max(1.0, scale);
    filter.taps = (static_cast<int>(std::ceil(support)) * 2 + 1 + 3) / 4 * 4;  // whole groups of four
    filter.first.resize(size);
    filter.weights.assign(size_t{size} * filter.taps, 0);
    exact.resize(filter.taps);
    for (uint32_t i = 0; i < size; ++i) {
        const double middle = low + (i + 0.5) * scale;
        const int begin = std::max(0, static_cast<int>(middle - support + 0.5));
        const int end = std::min(static_cast<int>(num_inputs), static_cast<int>(middle + support + 0.5));
        double total = 0;
        for (int k = begin; k < end; ++k) {
            exact[k - begin] = std::max(0.0, 1.0 - std::abs((k - middle + 0.5) / support));
            total += exact[k - begin];
        }
        const uint32_t place = mirrored ? size - 1 - i : i;
        int left = 1 << kBits, largest = 0;
        int16_t* weights = &filter.weights[size_t{place} * filter.taps];
        for (int k = 0; k < end - begin; ++k) {
            weights[k] = static_cast<int16_t>(std::lrint(exact[k] / total * (1 << kBits)));
            left -= weights[k];
            if (weights[k] > weights[largest]) largest = k;
        }
        weights[largest] = static_cast<int16_t>(weights[largest] + left);  // so that white stays white
        filter.first[place] = begin;
    }
}

// The first place in `spread` that 32-byte loads are fast from; 16 more elements than needed leave room for it.
int16_t* aligned(std::vector<int16_t>& spread) {
    return reinterpret_cast<int16_t*>((reinterpret_cast<uintptr_t>(spread.data()) + 31) / 32 * 32);
}

// Of `taps` weights, how many there are before the zeros at the end.
int num_used(const int16_t* weights, int taps) {
    while (taps > 1 && weights[taps - 1] == 0) --taps;
    return taps;
}

// out[i] = sum over k of weights[k] * lines[k * stride + i], for i in [begin, end).
void sum_rows_plain(const uint8_t* lines, size_t stride, const int16_t* weights, int count, size_t begin, size_t end, uint8_t* out) {
    for (size_t i = begin; i < end; ++i) {
        int32_t sum = kHalf;
        for (int k = 0; k < count; ++k) sum += lines[k * stride + i] * weights[k];
        out[i] = static_cast<uint8_t>(sum >> kBits);
    }
}

// A row of the output: each pixel the sum of neighbours in `row`.
void sum_pixels_plain(const uint8_t* row, const Filter& filter, uint32_t begin, uint32_t size, uint8_t* out) {
    for (uint32_t x = begin; x < size; ++x) {
        const uint8_t* from = row + size_t{3} * filter.first[x];
        const int16_t* weights = &filter.weights[size_t{x} * filter.taps];
        const int count = num_used(weights, filter.taps);
        for (int channel = 0; channel < 3; ++channel) {
            int32_t sum = kHalf;
            for (int k = 0; k < count; ++k) sum += from[3 * k + channel] * weights[k];
            out[3 * x + channel] = static_cast<uint8_t>(sum >> kBits);
        }
    }
}

#if defined(__x86_64__)
// The same sums, two terms in one multiplication.

__attribute__((target("avx2"))) void sum_rows(const uint8_t* lines, size_t stride, const int16_t* weights, int count, size_t num_bytes,
                                            uint8_t* out) {
    const __m256i zero = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + 32 <= num_bytes; i += 32) {
        __m256i sums[4];
        for (auto& sum : sums) sum = _mm256_set1_epi32(kHalf);
        for (int k = 0; k < count; k += 2) {
            const uint8_t* line = lines + k * stride + i;
            const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
            const __m256i two = k + 1 < count ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + stride)) : zero;
            const __m256i pair = _mm256_set1_epi32(static_cast<uint16_t>(weights[k]) | static_cast<int32_t>(weights[k + 1]) << 16);
            const __m256i low = _mm256_unpacklo_epi8(one, two), high = _mm256_unpackhi_epi8(one, two);
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), pair));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), pair));
            sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), pair));
            sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), pair));
        }
        for (auto& sum : sums) sum = _mm256_srai_epi32(sum, kBits);
        const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bytes);
    }
    sum_rows_plain(lines, stride, weights, count, i, num_bytes, out);
}

// Weights as `sum_pixels` multiplies by them: of four taps, the first two four times, then the other two.
void spread_weights(const Filter& filter, std::vector<int16_t>& spread) {
    spread.resize(filter.weights.size() * 4 + 16);
    int16_t* to = aligned(spread);
    for (size_t group = 0; group < filter.weights.size(); group += 4) {
        for (size_t half = group; half < group + 4; half += 2) {
            for (int copy = 0; copy < 4; ++copy, to += 2) std::memcpy(to, &filter.weights[half], 2 * sizeof *to);
        }
    }
}

// `row` is read up to as many pixels as there are taps behind its end, and 4 bytes. kGroups: of four taps; 0: as many as there are.
// Returns how many pixels were done: those whose stores stay within the row.
template <int kGroups>
__attribute__((target("avx2"))) uint32_t sum_pixels(const uint8_t* row, const Filter& filter, const int16_t* spread, uint32_t size,
                                                  uint8_t* out) {
    const __m256i taps = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
                                          6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m128i packed = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1), half = _mm_set1_epi32(kHalf);
    const int groups = kGroups ? kGroups : filter.taps / 4;
    const int32_t* first = filter.first.data();
    const auto* weights = reinterpret_cast<const __m256i*>(spread);
    uint32_t x = 0;
    for (; 3 * (x + 4) + 4 <= 3 * size; x += 4) {
        __m128i pixels[4];
        for (int i = 0; i < 4; ++i) {
            const uint8_t* from = row + ptrdiff_t{3} * first[x + i];
            __m256i sum = _mm256_setzero_si256();
            for (int group = 0; group < groups; ++group, from += 12, ++weights) {
                const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(both, taps), *weights));
            }
            const __m128i total = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
            pixels[i] = _mm_srai_epi32(_mm_add_epi32(total, half), kBits);
        }
        const __m128i bytes = _mm_packus_epi16(_mm_packs_epi32(pixels[0], pixels[1]), _mm_packs_epi32(pixels[2], pixels[3]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + size_t{3} * x), _mm_shuffle_epi8(bytes, packed));
    }
    return x;
}

uint32_t sum_pixels(const uint8_t* row, const Filter& filter, const int16_t* spread, uint32_t size, uint8_t* out) {
    switch (filter.taps) {
        case 4: return sum_pixels<1>(row, filter, spread, size, out);
        case 8: return sum_pixels<2>(row, filter, spread, size, out);
        default: return sum_pixels<0>(row, filter, spread, size, out);
    }
}

bool uses_vectors = __builtin_cpu_supports("avx2");
#else
bool uses_vectors = false;
void sum_rows(const uint8_t*, size_t, const int16_t*, int, size_t, uint8_t*) {}
void spread_weights(const Filter&, std::vector<int16_t>&) {}
uint32_t sum_pixels(const uint8_t*, const Filter&, const int16_t*, uint32_t, uint8_t*) { return 0; }
#endif

// A row of the output at a time: first the rows that it is a sum of, then in this one row the columns.
void resize(const Pixels& pixels, uint32_t width, uint32_t height, bool mirrored, uint8_t* out, Scratch& scratch) {
    const size_t row_bytes = size_t{3} * pixels.width;
    Filter &vertical = scratch.vertical, &horizontal = scratch.horizontal;
    make_filter(pixels.top, pixels.bottom, pixels.height, height, false, vertical, scratch.exact);
    make_filter(pixels.left, pixels.right, pixels.width, width, mirrored, horizontal, scratch.exact);
    scratch.row.resize(row_bytes + size_t{3} * horizontal.taps + kMargin);
    if (uses_vectors) spread_weights(horizontal, scratch.spread);
    uint8_t* row = scratch.row.data();
    for (uint32_t y = 0; y < height; ++y, out += size_t{3} * width) {
        const uint8_t* lines = pixels.data + vertical.first[y] * pixels.stride;
        const int16_t* weights = &vertical.weights[size_t{y} * vertical.taps];
        const int count = num_used(weights, vertical.taps);
        uint32_t done = 0;
        if (uses_vectors) {
            sum_rows(lines, pixels.stride, weights, count, row_bytes, row);
            done = sum_pixels(row, horizontal, aligned(scratch.spread), width, out);
        } else {
            sum_rows_plain(lines, pixels.stride, weights, count, 0, row_bytes, row);
        }
        sum_pixels_plain(row, horizontal, done, width, out);
    }
}

// What a batch is read from.
struct File {
    const uint8_t* data;
    uint64_t num_bytes;
    const uint8_t* rows;  // FFCV's metadata, the image's field first
    uint64_t row_stride;
    const uint64_t* sizes;  // of the images' data, by sample

    bool holds(uint64_t offset, uint64_t size) const { return offset <= num_bytes && size <= num_bytes - offset; }
};

uint64_t number_at(const uint8_t* address) {
    uint64_t value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

// The image's data, then those of its target, then the row that leads to them: what `writer.py` has summed up.
Status verify(const File& file, const uint8_t* row, const uint8_t* data, uint64_t size, const Settings& settings) {
    if (settings.checksum_offset == 0) return kGood;
    uint32_t sum = libdeflate_crc32(0, data, size);
    if (settings.target_offset != 0) {
        const uint64_t target = number_at(row + settings.target_offset);
        if (!file.holds(target, settings.target_bytes)) return kOutside;
        sum = libdeflate_crc32(sum, file.data + target, settings.target_bytes);
    }
    sum = libdeflate_crc32(sum, row, settings.checksum_offset);
    return sum == number_at(row + settings.checksum_offset) ? kGood : kChecksum;
}

Status decode_one(const File& file, uint64_t sample, const Settings& settings, uint8_t* out, Scratch& scratch) {
    const uint8_t* address = file.rows + sample * file.row_stride;
    Row row;
    std::memcpy(&row, address, sizeof row);
    const uint64_t num_bytes = file.sizes[sample];
    if (row.width == 0 || row.height == 0 || !file.holds(row.offset, num_bytes)) return kOutside;
    const uint8_t* data = file.data + row.offset;
    if (const Status status = verify(file, address, data, num_bytes, settings)) return status;
    const Region region = region_of(settings, sample, row.width, row.height);
    const auto size = static_cast<uint32_t>(settings.size);
    Pixels pixels;
    if (row.mode == kRaw) {
        const size_t stride = size_t{3} * row.width;
        if (num_bytes != stride * row.height) return kWrongSize;
        pixels = {data + region.y * stride + size_t{3} * region.x, region.width, region.height, stride, 0.0, 0.0,
                  static_cast<double>(region.width), static_cast<double>(region.height)};
    } else {
        scratch.pixels.resize(size_t{3} * row.width * row.height + kMargin);
        if (const Status status = decode_jpeg(data, num_bytes, row, region, size, scratch, pixels)) return status;
    }
    resize(pixels, size, size, region.mirrored, out, scratch);
    return kGood;
}

Status copy_one(const File& file, uint64_t sample, const Settings& settings, uint8_t* out) {
    const uint8_t* address = file.rows + sample * file.row_stride;
    const uint64_t offset = number_at(address), num_bytes = file.sizes[sample];
    if (!file.holds(offset, num_bytes)) return kOutside;
    if (const Status status = verify(file, address, file.data + offset, num_bytes, settings)) return status;
    std::memcpy(out, file.data + offset, num_bytes);
    return kGood;
}

}  // namespace

extern "C" {

// Changes with the functions below, so that code which calls an older library says so.
int32_t dist_gsl_decode_version() { return 3; }

// Whether wide vectors are used, where the CPU has them: pixels are the same without. Returns whether they are.
int32_t dist_gsl_use_vectors(int32_t wanted) {
#if defined(__x86_64__)
    uses_vectors = wanted && __builtin_cpu_supports("avx2");
#endif
    return uses_vectors;
}

// Decodes samples `positions[0..count)` to `out`, or where the settings say, uint8 (count, size, size, 3). Returns 0; or the status
// of the first sample of the batch that is not good, which is then in `bad_sample`.
int32_t dist_gsl_decode(const uint8_t* data, uint64_t num_bytes, const uint8_t* rows, uint64_t row_stride, const uint64_t* sizes,
                        const uint64_t* positions, uint64_t count, const Settings* settings, uint8_t* out, uint64_t* bad_sample) {
    const File file{data, num_bytes, rows, row_stride, sizes};
    if (settings->out) out = reinterpret_cast<uint8_t*>(settings->out);
    const size_t image_bytes = size_t{3} * settings->size * settings->size;
    std::atomic<uint64_t> next{0};
    std::vector<int32_t> statuses(count, kGood);
    auto work = [&] {
        Scratch scratch;
        for (uint64_t i = next++; i < count; i = next++) {
            statuses[i] = decode_one(file, positions[i], *settings, out + i * image_bytes, scratch);
        }
    };
    std::vector<std::thread> others;
    for (uint64_t i = 1; i < std::min<uint64_t>(settings->num_threads, count); ++i) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
    for (uint64_t i = 0; i < count; ++i) {
        if (statuses[i] != kGood) {
            *bad_sample = positions[i];
            return statuses[i];
        }
    }
    return kGood;
}

// The same for arrays, whose rows begin with their address, one after another to `out`.
int32_t dist_gsl_copy(const uint8_t* data, uint64_t num_bytes, const uint8_t* rows, uint64_t row_stride, const uint64_t* sizes,
                      const uint64_t* positions, uint64_t count, const Settings* settings, uint8_t* out, uint64_t* bad_sample) {
    const File file{data, num_bytes, rows, row_stride, sizes};
    for (uint64_t i = 0; i < count; ++i) {
        if (const Status status = copy_one(file, positions[i], *settings, out)) {
            *bad_sample = positions[i];
            return status;
        }
        out += sizes[positions[i]];
    }
    return kGood;
}

// Verifies samples `begin` to `end`, whose rows begin with an image (`is_colour`) or with an array's address. As above.
int32_t dist_gsl_verify(const uint8_t* data, uint64_t num_bytes, const uint8_t* rows, uint64_t row_stride, const uint64_t* sizes,
                        uint64_t begin, uint64_t end, int32_t is_colour, const Settings* settings, uint64_t* bad_sample) {
    const File file{data, num_bytes, rows, row_stride, sizes};
    for (uint64_t sample = begin; sample < end; ++sample) {
        const uint8_t* row = rows + sample * row_stride;
        const uint64_t offset = number_at(row + (is_colour ? offsetof(Row, offset) : 0));
        Status status = kOutside;
        if (file.holds(offset, sizes[sample])) status = verify(file, row, data + offset, sizes[sample], *settings);
        if (status) {
            *bad_sample = sample;
            return status;
        }
    }
    return kGood;
}

// Adds the levels of each channel of interleaved pixels to `sums`, and their squares to `squares`.
int32_t dist_gsl_moments(const uint8_t* pixels, uint64_t count, uint64_t channels, uint64_t* sums, uint64_t* squares) {
    constexpr uint64_t kAtOnce = 1 << 16;  // whose squares fit 32 bits
    for (uint64_t done = 0; done < count; done += kAtOnce, pixels += kAtOnce * channels) {
        const uint64_t pixels_now = std::min(kAtOnce, count - done);
        for (uint64_t channel = 0; channel < channels; ++channel) {
            uint32_t sum = 0, square = 0;
            const uint8_t* level = pixels + channel;
            if (channels == 3) {  // said outright, it becomes vectors
                for (uint64_t i = 0; i < pixels_now; ++i) sum += level[3 * i], square += level[3 * i] * level[3 * i];
            } else {
                for (uint64_t i = 0; i < pixels_now; ++i) sum += level[channels * i], square += level[channels * i] * level[channels * i];
            }
            sums[channel] += sum;
            squares[channel] += square;
        }
    }
    return kGood;
}

// `width` x `height` pixels in colour to `out`, of other sides, by the same filter as the regions.
int32_t dist_gsl_resize(const uint8_t* pixels, uint32_t width, uint32_t height, uint32_t out_width, uint32_t out_height, uint8_t* out) {
    Scratch scratch;
    resize({pixels, width, height, size_t{3} * width, 0.0, 0.0, static_cast<double>(width), static_cast<double>(height)}, out_width,
           out_height, false, out, scratch);
    return kGood;
}

// Levels to floats by a table for each channel, (channels, 256): `count` images of `num_pixels` interleaved pixels to planes one
// after another, or as they lie.
int32_t dist_gsl_normalise(const uint8_t* levels, uint64_t count, uint64_t num_pixels, uint64_t channels, const float* table,
                           int32_t to_planes, float* out, uint64_t num_threads) {
    const uint64_t image = num_pixels * channels;
    std::atomic<uint64_t> next{0};
    auto work = [&] {
        for (uint64_t i = next++; i < count; i = next++) {
            const uint8_t* from = levels + i * image;
            float* to = out + i * image;
            if (to_planes && channels == 3) {
                float *red = to, *green = to + num_pixels, *blue = green + num_pixels;
                for (uint64_t p = 0; p < num_pixels; ++p, from += 3) {
                    red[p] = table[from[0]];
                    green[p] = table[256 + from[1]];
                    blue[p] = table[512 + from[2]];
                }
            } else {
                for (uint64_t p = 0; p < num_pixels; ++p) {
                    for (uint64_t c = 0; c < channels; ++c) {
                        to[to_planes ? c * num_pixels + p : p * channels + c] = table[256 * c + from[p * channels + c]];
                    }
                }
            }
        }
    };
    std::vector<std::thread> others;
    for (uint64_t i = 1; i < std::min<uint64_t>(num_threads, count); ++i) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
    return kGood;
}

// Width and height of a JPEG, and its status.
int32_t dist_gsl_jpeg_size(const uint8_t* data, uint64_t num_bytes, uint32_t* size) {
    jpeg_decompress_struct info;
    Failure failure;
    info.err = handled_by(failure);
    if (setjmp(failure.jump)) {
        jpeg_destroy_decompress(&info);
        return kBadJpeg;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, const_cast<uint8_t*>(data), num_bytes);
    jpeg_read_header(&info, TRUE);
    size[0] = info.image_width;
    size[1] = info.image_height;
    jpeg_destroy_decompress(&info);
    return kGood;
}

// A whole JPEG to `out`, uint8 (height, width, 3). What libjpeg only warns of, as of data that end early, is an error here.
int32_t dist_gsl_jpeg(const uint8_t* data, uint64_t num_bytes, uint32_t width, uint32_t height, uint8_t* out) {
    Scratch scratch;
    scratch.pixels.resize(size_t{3} * width * height + kMargin);
    Row row{kJpeg, static_cast<uint16_t>(width), static_cast<uint16_t>(height), 0};
    Pixels pixels;
    const Region whole{0, 0, width, height, false};
    if (const Status status = decode_jpeg(data, num_bytes, row, whole, std::max(width, height), scratch, pixels)) return status;
    std::memcpy(out, scratch.pixels.data(), size_t{3} * width * height);
    return kGood;
}

// Whether a JPEG, of whatever colours, can be decoded to its end.
int32_t dist_gsl_jpeg_check(const uint8_t* data, uint64_t num_bytes) {
    jpeg_decompress_struct info;
    Failure failure;
    info.err = handled_by(failure);
    if (setjmp(failure.jump)) {
        jpeg_destroy_decompress(&info);
        return kBadJpeg;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, const_cast<uint8_t*>(data), num_bytes);
    jpeg_read_header(&info, TRUE);
    info.out_color_space = info.jpeg_color_space;
    jpeg_start_decompress(&info);
    // libjpeg's own memory, which it frees however this ends.
    JSAMPARRAY row = (*info.mem->alloc_sarray)(reinterpret_cast<j_common_ptr>(&info), JPOOL_IMAGE,
                                               info.output_width * info.output_components, 1);
    while (info.output_scanline < info.output_height) {
        if (jpeg_read_scanlines(&info, row, 1) != 1) break;
    }
    const bool is_bad = info.err->num_warnings > 0 || info.output_scanline < info.output_height;
    jpeg_destroy_decompress(&info);
    return is_bad ? kBadJpeg : kGood;
}

// The region that would be read of a sample: x, y, width, height, and whether it is mirrored.
int32_t dist_gsl_region(const Settings* settings, uint64_t sample, uint32_t width, uint32_t height, uint32_t* region) {
    const Region chosen = region_of(*settings, sample, width, height);
    region[0] = chosen.x;
    region[1] = chosen.y;
    region[2] = chosen.width;
    region[3] = chosen.height;
    region[4] = chosen.mirrored ? 1 : 0;
    return kGood;
}

}  // extern "C"
