// The block kernels as one table of function pointers per instruction set. They see raw pointers
// and a few thousand elements at a time; cutting tensors up, threads and reductions are the
// callers' work.
//
// Numeric contract, the same bits for every table: fp32 arithmetic with one operation per written
// operation (no contraction), fp64 sums in 8 lanes (element e of a block goes to lane e % 8, in
// ascending order), one rounding to nearest even on a store, NaN stays NaN and is quiet.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "tensor.h"

namespace fastmerge {

constexpr int kSumLanes = 8;
// Callers cut tensors at multiples of this flat index, so that the lanes, the Philox counters and
// the high word of the flat index line up; only a tensor's or a piece's first and last tile are cut
// shorter.
constexpr int64_t kTile = 2048;

// How a kernel decides whether one delta's entry survives, within one tile (the high word of the
// flat index is the same for a whole tile).
struct Keep {
    enum Kind : int32_t {
        kAll,
        kAbove,       // key > threshold, key being the fp32 bit pattern of |delta|
        kAboveOrTie,  // ... or key == threshold and order word <= order_max
        kBand,        // as kAboveOrTie, and not: key > ceiling, or key == ceiling and order word
                      // <= ceiling_order_max
        kRandom,      // Philox word <= word_max
        kMasked,      // its bit is set
    };
    Kind kind = kAll;
    // The order word is the mixed index's high word, not the flat index's low word.
    bool mixed = true;
    int32_t threshold = 0;
    uint32_t order_max = 0;
    int32_t ceiling = 0;
    uint32_t ceiling_order_max = 0;
    uint32_t word_max = 0;
    const uint32_t* mask = nullptr;        // kMasked: bits by flat index
    const uint64_t* round_keys = nullptr;  // kRandom: Philox's 20 round keys, one per 64-bit word
};

// Number: what is computed in.
template <class Number>
struct CombineArgsOf {
    const void* const* inputs;
    const Number* const* coefficients;  // per input: one value, or one per element
    bool per_element;
    // -0 where one coefficient is nonzero, else +0: one value or one per element.
    const Number* starts;
    int inputs_count;
    float divisor;
    bool divide;
    void* out;
    bool past_caches;  // how `out` is written where that is known to pay; the values are the same
    int64_t count;
};
using CombineArgs = CombineArgsOf<float>;
using WideCombineArgs = CombineArgsOf<double>;  // never divided; of fp32 where per_element

// One delta's part in a consensus: D = (x - base) * (kept ? on : off), then * weight when rescaled,
// or after the election where that is of unweighted deltas; share: its part of the divisor.
struct Term {
    Keep keep;
    float on, off;
    float weight, share;
    bool rescaled;
};

// What an election sums: weighted deltas, the deltas as they are, or their signs.
enum class Votes : int { kWeighted = 0, kPlain = 1, kFrequency = 2, kLast = kFrequency };

struct ConsensusArgs {
    const void* const* inputs;
    const void* base;
    void* out;
    const Term* terms;
    int inputs_count;
    bool elect, normalize;
    Votes votes;
    float divisor;  // without election: the sum of the shares, guarded
    float scale;
    uint64_t index;  // flat index of the first element
    int64_t count;   // does not cross a multiple of kTile
    float* scratch;  // kConsensusScratch floats per input
};
constexpr int kConsensusScratch = 32;

// Counts the keys of one delta against a window [low, high] that brackets the threshold. Keys
// inside that are neither of the two peaks are gathered, and the places in the tile of those at the
// first peak where `tied` is not null.
struct Window {
    int32_t low, high;
    int32_t peaks[2];  // keys expected to be frequent; -1 for none
    int64_t above;     // += keys > high
    int64_t at_peak[2];
    int32_t* gathered;  // room for kTile + 16
    int64_t gathered_count;
    uint32_t* tied;  // room for kTile + 16
    int64_t tied_count;
};

// Counts the entries of one delta whose key is `key` by their order words: those up to `below`
// (where any_below), and gathers those above that and up to `last` (where any).
struct TieWindow {
    int32_t key;
    bool mixed;
    bool any_below, any;
    uint32_t below, last;
    int64_t below_count;  // += entries up to `below`
    uint32_t* gathered;   // room for kTile + 16; order words
    int64_t gathered_count;
};

// fp64 sums of |delta| over all entries and over the kept ones, in lanes, and the kept entries'
// number. `drawn`, where it is not null: for the bits of a random draw's kept entries, by flat
// index; in whole words.
struct Mass {
    Keep keep;
    uint32_t* drawn;
    double all[kSumLanes];
    double kept[kSumLanes];
    int64_t count;
};

struct DeltaArgs {
    const void* const* inputs;
    const void* base;
    int inputs_count;
    uint64_t index;
    int64_t count;  // does not cross a multiple of kTile; index is one
};

// What each entry of a tensor becomes, from the base's and the models' at its place; the names and
// numbers of each are in _C.pyi.
enum class Formula : int {
    kZero,
    kNearSwap,
    kActive,
    kReinforced,
    kVariance,
    kVaried,
    kVariedDelta,
    kSelectAndErase,
    kImportance,
    kFuse,
    kLargest,
    kAgreed,
    kExpression,
    kLast,
};

// What an expression does to entries: `to` = of a, b and c, the places of results and operands.
enum class Op : int {
    kConstant,  // numbers[a]
    kCopy,
    kAdd,
    kSubtract,
    kMultiply,
    kDivide,
    kNegative,
    kAbsolute,
    kMinimum,
    kMaximum,
    kLess,
    kLessEqual,
    kWhere,
    kLast,
};

// Places are numbered: the inputs, the base, then room for results; an operation writes none of
// those it reads, and the last one's result is the expression's.
struct Operation {
    Op op;
    int to, a, b, c;
};

struct PointwiseArgs {
    Formula kind;
    const float* const* inputs;
    const float* base;
    float* out;
    int inputs_count;
    const float* numbers;
    const float* factors;  // of each entry, where the formula has them
    Keep keep;
    uint64_t index;  // flat index of the first element
    int64_t count;   // does not cross a multiple of kTile
    const Operation* operations;
    int operations_count;
    float* results;  // room for `count` elements at each multiple of results_step
    int64_t results_step;
};

// Part of a row: see kernels/divergence.inl. Of eight lanes each addition waits for the one before
// (0.5 ns an entry for the three sums, with 32 of them 0.1).
constexpr int kMoveLanes = 32;
struct MovesArgs {
    const float* x;
    const float* base;
    float* weights;  // e^base
    float* moved;    // e^(x - base) - 1
    int64_t count;
};
struct MoveSums {
    double weights[kMoveLanes], products[kMoveLanes];
    int64_t far;  // entries that are too far for it
};
struct MovedArgs {
    const float* weights;
    const float* moved;
    float mean, gain, added;  // s, 1 / (1 + s), 2e-8 times the sum of weights
    int64_t count;
};

// Part of a row: e^(entry - the row's largest), and one over the row's sum of those.
struct DivergenceArgs {
    const double* x;
    const double* base;
    double x_factor, base_factor;
    int64_t count;
};

// Part of one row of a matrix plus a product of two thin ones: see kernels/low_rank.inl.
struct LowRankArgs {
    const void* base;
    const float* left;   // rank numbers: the row of the left matrix
    const float* right;  // rank rows, `cols` apart
    int64_t rank, cols;
    float scale;
    const float* factors;  // none, one, or (per_element) one for each element
    bool per_element;
    float* out;
    int64_t count;
};

struct Kernels {
    const char* isa;
    // Indexed by DType.
    void (*widen[kDTypes])(const void* in, float* out, int64_t count);
    void (*narrow[kDTypes])(const float* in, void* out, int64_t count);
    int64_t (*nonfinite[kDTypes])(const void* in, int64_t count);
    // sums[pair][lane] += products; pairs in the order 00, 01, 11 and 00, 01, 02, 11, 12, 22.
    // The second row: of the first vector and the others' differences to it, rounded to fp32.
    void (*gram2[2][kDTypes])(const void* const* inputs, int64_t count, double* sums);
    void (*gram3[2][kDTypes])(const void* const* inputs, int64_t count, double* sums);
    // Any number of fp32 vectors; the upper triangle by rows.
    void (*gram)(const float* const* inputs, int vectors, int64_t count, double* sums);
    // Each element is a vector of its own: sums[pair][element] += product.
    void (*gram_columns)(const float* const* inputs, int vectors, int64_t count, double* sums);
    void (*subtract)(const float* base, float* in_out, int64_t count);  // in_out -= base
    void (*combine[kDTypes])(const CombineArgs& args);
    void (*combine_wide[kDTypes])(const WideCombineArgs& args);
    void (*consensus[kDTypes])(const ConsensusArgs& args);
    void (*count_keys[kDTypes])(const DeltaArgs& args, Window* windows);
    void (*count_ties[kDTypes])(const DeltaArgs& args, TieWindow* windows);
    // The same of the entries at these places in the tile at `index`.
    void (*count_orders)(uint32_t* places, int64_t number, uint64_t index, TieWindow& window);
    void (*measure[kDTypes])(const DeltaArgs& args, Mass* masses);
    void (*pointwise)(const PointwiseArgs& args);
    void (*moves)(const MovesArgs& args, MoveSums& sums);
    // lanes += p ln(p / q) - p + q, times the sum of weights
    void (*moved_divergence)(const MovedArgs& args, double* lanes);
    float (*largest_of)(const float* x, int64_t count, float most);
    // values = e^(x - most), which are added to the lanes.
    void (*exponentials)(const float* x, int64_t count, float most, double* values, double* lanes);
    // lanes += p ln(p / q), p and q the softmax of x and base, each plus 1e-8
    void (*divergence)(const DivergenceArgs& args, double* lanes);
    void (*low_rank[kDTypes])(const LowRankArgs& args);
    // The words of a key's elements from `index` on.
    void (*random_words)(const uint64_t* round_keys, uint64_t index, int64_t count, uint32_t* out);
    // A draw by rank's own; see kernels/rank.inl.
    uint32_t (*magnitudes)(const float* deltas, int64_t count, uint32_t* keys);
    int64_t (*undecided)(const uint32_t* words, int64_t count, uint32_t low, uint32_t span,
                         uint8_t* kept, uint32_t* places);
    int64_t (*entries_before)(const uint32_t* keys, const uint32_t* orders, int64_t entries,
                              uint32_t key, uint32_t order);
    int64_t (*orders_of)(const uint32_t* keys, const uint32_t* orders, int64_t count, uint32_t key,
                         uint32_t* out);
    // out = code * scale, one rounding: E4M3, E5M2.
    void (*dequantise[2])(const uint8_t* codes, float scale, float* out, int64_t count);
    uint64_t (*weigh)(const void* words, const uint64_t* keys, int64_t count);
};

// The table in use: the best this CPU runs, or the one FASTMERGE_ISA or set_isa names. Throws
// std::invalid_argument where FASTMERGE_ISA is unknown or not supported.
const Kernels& kernels();
std::vector<std::string> supported_isas();  // best first
void set_isa(const std::string& name);

}  // namespace fastmerge
