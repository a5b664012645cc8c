// Selective token replacement with extrapolation: the kernel.
//
//   draft ~ filter(softmax(z_draft / T));  selected by the criterion at temperature 1 over the whole vocabulary
//   token ~ filter(softmax(((1 + γ) z_R − γ z_B) / T)) if selected, else the draft
//
// logits, base_logits (rows, V) of bfloat16, float16 or float32, any strides → outputs (rows,). A cluster samples one
// row; each of its blocks reads its part of both models' logits from memory once and keeps it in shared memory, where
// they fit. float32; softmax sums in double between threads. Deterministic: a sum of floats has one order, whatever the
// size of the cluster, masses that a filter adds are integers, and a draw is a maximum.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cluster.cuh"
#include "extrapolated_sample.h"
#include "logits.cuh"

namespace dlogp {

// Tokens that may be kept are listed, so that later walks look at them alone; of so many of a block.
constexpr uint32_t kListed = 4096;
constexpr int kBuckets = 256;
// A mass of 1, that of the largest logit. 2²³ tokens of it stay below 2⁶⁴.
constexpr float kMassOne = 0x1p40f;
// The least noise, −log(33·log 2), a little down: the largest logit has a score of that much more.
constexpr float kLeastGumbel = -3.14f;
constexpr uint32_t kNoToken = 0xFFFFFFFFu;

struct RowMaxima {
  float z = -INFINITY, base_z = -INFINITY, least_base = INFINITY;
  uint32_t bad = 0;  // a NaN or +inf

  __device__ void add(float rl, float base) {
    bad |= !(rl < INFINITY) || !(base < INFINITY);
    z = fmaxf(z, rl);
    base_z = fmaxf(base_z, base);
    if (base > -INFINITY) least_base = fminf(least_base, base);
  }
  __device__ bool can_draw() const { return bad == 0 && z > -INFINITY && base_z > -INFINITY; }
};

struct MergeMaxima {
  __device__ RowMaxima operator()(const RowMaxima& a, const RowMaxima& b) const {
    return {fmaxf(a.z, b.z), fmaxf(a.base_z, b.base_z), fminf(a.least_base, b.least_base), a.bad | b.bad};
  }
};

// Sums about the row's maxima. A thread adds its few tokens in float; between threads they are double.
struct SoftmaxSums {
  double sum, base_sum;

  __device__ PairState<float> about(const RowMaxima& maxima) const {
    PairState<float> state;
    state.model = {maxima.z, sum, 0};
    state.base = {maxima.base_z, base_sum, 0};
    return state;
  }
  __device__ friend SoftmaxSums operator+(const SoftmaxSums& a, const SoftmaxSums& b) {
    return {a.sum + b.sum, a.base_sum + b.base_sum};
  }
};

struct ThreadSoftmaxSums {
  float sum = 0, base_sum = 0;

  __device__ void add(float d, float base_d) {
    sum += expf(d);
    base_sum += expf(base_d);
  }
  __device__ SoftmaxSums wide() const { return {sum, base_sum}; }
};

// Those of PairState too.
struct PairSums {
  double sum, base_sum, weighted, base_weighted, cross, base_cross;
  uint32_t alone, unused;

  __device__ PairState<float> about(const RowMaxima& maxima) const {
    PairState<float> state;
    state.model = {maxima.z, sum, weighted};
    state.base = {maxima.base_z, base_sum, base_weighted};
    state.cross = cross;
    state.base_cross = base_cross;
    state.model_alone = (alone & 1) != 0;
    state.base_alone = (alone & 2) != 0;
    return state;
  }
  __device__ friend PairSums operator+(const PairSums& a, const PairSums& b) {
    return {a.sum + b.sum,     a.base_sum + b.base_sum,     a.weighted + b.weighted, a.base_weighted + b.base_weighted,
            a.cross + b.cross, a.base_cross + b.base_cross, a.alone | b.alone,       0};
  }
};

struct ThreadPairSums {
  float sum = 0, base_sum = 0, weighted = 0, base_weighted = 0, cross = 0, base_cross = 0;
  uint32_t alone = 0;  // bit 0: a token that only the RL model can draw, bit 1: only the base

  __device__ void add(float d, float base_d) {
    const float e = expf(d), base_e = expf(base_d);
    const bool possible = d > -INFINITY, base_possible = base_d > -INFINITY;
    sum += e;
    base_sum += base_e;
    if (possible) weighted += e * d;
    if (base_possible) base_weighted += base_e * base_d;
    if (possible && base_possible) {
      cross += e * (d - base_d);
      base_cross += base_e * (base_d - d);
    }
    alone |= uint32_t(possible && !base_possible) | uint32_t(base_possible && !possible) << 1;
  }
  __device__ PairSums wide() const { return {sum, base_sum, weighted, base_weighted, cross, base_cross, alone, 0}; }
};

struct Add {
  template <typename T>
  __device__ T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

struct MergeLargest {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Of equal scores the first token wins.
struct Winner {
  float score = -INFINITY;
  uint32_t token = kNoToken;

  __device__ void take(float other_score, uint32_t other_token) {
    if (other_score > score || (other_score == score && other_token < token)) *this = {other_score, other_token};
  }
};

struct MergeWinners {
  __device__ Winner operator()(Winner a, const Winner& b) const {
    a.take(b.score, b.token);
    return a;
  }
};

// Which logits are drawn from, and with whose noise.
struct Drawn {
  enum class From { kModel, kBase, kExtrapolation };

  From from;
  Stream stream;
  float gamma, least_base, temperature;

  // z / T, with T = 1 for greedy.
  __device__ float scaled(float z, float base_z) const {
    const float unscaled = from == From::kModel  ? z
                           : from == From::kBase ? base_z
                                                 : extrapolated(z, base_z, gamma, least_base);
    return temperature == 1.0f ? unscaled : unscaled / temperature;
  }
};

// An integer in the order of the numbers; the same for both zeros.
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xFFFFFFFFu : 0x80000000u);
}

// The least float that is not below `value`.
__device__ inline float round_up(double value) {
  const float rounded = float(value);
  return double(rounded) < value ? nextafterf(rounded, INFINITY) : rounded;
}

// What a filter adds up.
enum class Weight { kMass, kCount };

// Where the weight above, from the top bucket down, ceases to be too little.
struct Crossing {
  uint64_t above;
  uint32_t bucket;  // kBuckets: nowhere
};

struct Decision {
  uint32_t selected;
  float delta_logp;
};

struct SampleRoom {
  ReduceRoom reduce;
  // Twice, as in ReduceRoom: 64-bit weights in two words each.
  uint32_t low_words[2][kBuckets], high_words[2][kBuckets];
  uint64_t weight_of_warp[kBuckets / 32];
  Crossing crossing;
  PairState<float> state;
  Decision decision;
  uint32_t listed;
  uint32_t list[kListed];  // places in the block's part
};

template <typename Stored, bool kKept>
class RowSampler {
 public:
  using Part = std::conditional_t<kKept, KeptPart<Stored>, ReadPart<Stored>>;

  __device__ RowSampler(const SampleArguments& arguments, int slice_tokens, unsigned char* shared)
      : arguments_(arguments),
        row_(blockIdx.x / Cluster::size()),
        slices_(kSlices / Cluster::size()),
        slice_groups_(slice_tokens / kGroupTokens),
        first_(Cluster::rank() * slices_ * slice_tokens),
        room_(*reinterpret_cast<SampleRoom*>(shared)),
        reduction_(room_.reduce),
        z_(z_in_memory(), first_, kept_groups(shared)),
        base_(base_in_memory(), first_, kept_groups(shared) + groups()) {
    const int64_t step =
        arguments.steps != nullptr ? arguments.steps[row_ * arguments.steps_stride] : int64_t(arguments.step);
    const int64_t row_id = arguments.row_id != nullptr ? arguments.row_id[row_] : row_;
    noise_ = {uint32_t(row_id), uint32_t(step)};
    seed_ = arguments.seed != nullptr ? uint64_t(*arguments.seed) : arguments.options.seed;
  }

  __device__ void run() {
    read();
    if (maxima_.can_draw()) {
      sample();
    } else if (writes()) {
      write(kNoToken, kNoToken, {0, NAN}, NAN, NAN);
    }
    Cluster::sync();  // no block leaves while another one may look into its memory
  }

 private:
  __device__ static StoredGroup<Stored>* kept_groups(unsigned char* shared) {
    return reinterpret_cast<StoredGroup<Stored>*>(shared + sizeof(SampleRoom));
  }
  __device__ RowInMemory z_in_memory() const {
    return {arguments_.logits, arguments_.aligned, row_, int(arguments_.vocabulary)};
  }
  __device__ RowInMemory base_in_memory() const {
    return {arguments_.base_logits, arguments_.base_aligned, row_, int(arguments_.vocabulary)};
  }
  __device__ const SampleOptions& options() const { return arguments_.options; }
  __device__ int groups() const { return slices_ * slice_groups_; }
  __device__ bool writes() const { return Cluster::rank() == 0 && threadIdx.x == 0; }
  __device__ bool greedy() const { return options().temperature == 0; }

  // The one walk through memory, where the parts keep what they were given.
  __device__ void read() {
    const RowInMemory z_row = z_in_memory(), base_row = base_in_memory();
    const int count = groups();
    RowMaxima mine;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int token = first_ + i * kGroupTokens;
      const StoredGroup<Stored> z = group_of<Stored>(z_row, token), base = group_of<Stored>(base_row, token);
      z_.keep(i, z);
      base_.keep(i, base);
      const Group wide = z.widened(), base_wide = base.widened();
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) mine.add(wide.z[j], base_wide.z[j]);
    }
    maxima_ = reduction_.all(mine, MergeMaxima{});
  }

  // The draft, and a second turn for its replacement.
  __device__ void sample() {
    if (needs_all_sums(options().criterion))
      sum_up<ThreadPairSums>();
    else
      sum_up<ThreadSoftmaxSums>();
    uint32_t draft = kNoToken, token = kNoToken;
    Decision decision = {1, 0};
#pragma unroll 1
    for (int turn = 0; turn < 2 && decision.selected != 0; ++turn) {
      token = draw(turn == 0 ? drawn_for_draft() : drawn_for_replacement()).token;
      if (turn == 0) {
        draft = token;
        decision = decide(draft);
      }
    }
    if (writes()) {
      const float logp = logp_of(room_.state.model, z_in_memory(), token);
      write(token, draft, decision, logp, logp_of(room_.state.base, base_in_memory(), token));
    }
  }

  // Into room_.state, for the first thread of the block.
  template <typename ThreadSums>
  __device__ void sum_up() {
    for (int slice = 0; slice < slices_; ++slice) {
      ThreadSums sums;
      const int end = (slice + 1) * slice_groups_;
      for (int i = slice * slice_groups_ + threadIdx.x; i < end; i += kThreads) {
        const Group z = z_.group(i), base = base_.group(i);
#pragma unroll
        for (int j = 0; j < kGroupTokens; ++j) sums.add(z.z[j] - maxima_.z, base.z[j] - maxima_.base_z);
      }
      reduction_.of_slice(slice, sums.wide(), Add{});
    }
    const auto total = reduction_.template slices<decltype(ThreadSums().wide())>(slices_, Add{});
    if (threadIdx.x == 0) room_.state = total.about(maxima_);
  }

  __device__ static float logp_of(const SoftmaxState<float>& state, const RowInMemory& row, uint32_t token) {
    // There is no token only where logits / T overflowed.
    return token == kNoToken ? NAN : float(state.logp(row.at(int(token))));
  }

  // One thread of each block: logarithms of doubles are slow on some GPUs.
  __device__ Decision decide(uint32_t draft) {
    if (threadIdx.x == 0) {
      const PairState<float>& state = room_.state;
      const float delta_logp =
          logp_of(state.model, z_in_memory(), draft) - logp_of(state.base, base_in_memory(), draft);
      SampleOptions seeded = options();
      seeded.seed = seed_;
      room_.decision = {is_selected(seeded, state, delta_logp, noise_), delta_logp};
    }
    __syncthreads();
    return room_.decision;
  }

  __device__ float temperature() const { return greedy() ? 1.0f : float(options().temperature); }

  __device__ Drawn drawn_for_draft() const {
    const Drawn::From from = options().draft_from_base ? Drawn::From::kBase : Drawn::From::kModel;
    return {from, Stream::kDraft, 0, 0, temperature()};
  }
  __device__ Drawn drawn_for_replacement() const {
    const Drawn::From from = options().gamma == 0 ? Drawn::From::kModel : Drawn::From::kExtrapolation;
    return {from, Stream::kReplacement, float(options().gamma), maxima_.least_base, temperature()};
  }

  // Calls use(place, s[4]) for the part's groups of four tokens; −inf beyond the vocabulary.
  template <typename Use>
  __device__ void for_groups(const Drawn& drawn, Use use) const {
    const int count = groups();
#pragma unroll 1  // four at a time are enough, and this loop is in many places
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Group z = z_.group(i), base = base_.group(i);
      float s[kGroupTokens];
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) s[j] = drawn.scaled(z.z[j], base.z[j]);
      use(i * kGroupTokens, s);
    }
  }

  // Calls use(place, s) for the tokens that are listed, or for all.
  template <typename Use>
  __device__ void for_tokens(const Drawn& drawn, Use use) const {
    if (is_listed_) {
#pragma unroll 1
      for (uint32_t i = threadIdx.x; i < room_.listed; i += kThreads) {
        const int place = int(room_.list[i]);
        use(place, drawn.scaled(z_.at(place), base_.at(place)));
      }
    } else {
      for_groups(drawn, [&](int place, const float (&s)[kGroupTokens]) {
#pragma unroll
        for (int j = 0; j < kGroupTokens; ++j) use(place + j, s[j]);
      });
    }
  }

  // Lists the tokens from `low` on, if they are few enough. Their order does not matter to what follows.
  __device__ void list_from(const Drawn& drawn, uint32_t low) {
    if (is_listed_) return;
    if (threadIdx.x == 0) room_.listed = 0;
    __syncthreads();
    for_groups(drawn, [&](int place, const float (&s)[kGroupTokens]) {
      uint32_t kept = 0;
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) kept += key_of(s[j]) >= low;
      if (kept == 0) return;
      uint32_t at = atomicAdd(&room_.listed, kept);
      if (at + kept > kListed) return;
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j)
        if (key_of(s[j]) >= low) room_.list[at++] = uint32_t(place + j);
    });
    __syncthreads();
    is_listed_ = room_.listed <= kListed;
    __syncthreads();  // the next list may begin
  }

  __device__ float largest_of(const Drawn& drawn) {
    // Division by T keeps the order.
    if (drawn.from == Drawn::From::kModel) return drawn.scaled(maxima_.z, 0);
    if (drawn.from == Drawn::From::kBase) return drawn.scaled(0, maxima_.base_z);
    float largest = -INFINITY;
    for_groups(drawn, [&](int, const float (&s)[kGroupTokens]) {
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) largest = fmaxf(largest, s[j]);
    });
    return reduction_.all(largest, MergeLargest{});
  }

  __device__ Winner draw(const Drawn& drawn) {
    is_listed_ = false;
    const float largest = largest_of(drawn);
    if (greedy()) return first_of(drawn, largest);
    return by_noise(drawn, largest, least_kept(drawn, largest));
  }

  __device__ Winner first_of(const Drawn& drawn, float largest) {
    Winner mine;
    for_tokens(drawn, [&](int place, float s) {
      if (s == largest) mine.take(s, uint32_t(first_ + place));
    });
    return reduction_.all(mine, MergeWinners{});
  }

  // The key of the least s that top-k, then top-p, then min-p keep.
  __device__ uint32_t least_kept(const Drawn& drawn, float largest) {
    const Filters& filters = options().filters;
    uint32_t cut = key_of(-INFINITY) + 1;
    const bool by_rank = filters.limits_rank(arguments_.vocabulary);
    if (by_rank) cut = cut_at(drawn, largest, cut, Weight::kCount, uint64_t(filters.top_k));
    if (filters.top_p < 1) {
      const uint64_t total = mass_from(drawn, largest, cut);
      if (!by_rank) cut = max(cut, key_of(largest - reach_of(total)));
      list_from(drawn, cut);
      // Kept are the tokens above which lies less than p of the mass.
      const uint64_t enough = uint64_t(ceil(filters.top_p * double(total)));
      cut = cut_at(drawn, largest, cut, Weight::kMass, enough > 0 ? enough : 1);
    }
    if (filters.min_p > 0) cut = max(cut, key_of(round_up(double(largest) + log(filters.min_p))));
    return cut;
  }

  // Even if all V tokens lay so far below the largest, they would have less than 1 − p of the mass together: what lies
  // lower is not kept.
  __device__ float reach_of(uint64_t total) const {
    const double mass = double(total) / double(kMassOne);
    return float(log(double(arguments_.vocabulary) / ((1 - options().filters.top_p) * mass)) + 1e-3);
  }

  __device__ static uint64_t mass_of(float s, float largest) {
    const float e = expf(s - largest);
    return e <= 1.0f ? uint64_t(e * kMassOne) : 0;  // not so where logits / T overflowed into NaN
  }

  __device__ uint64_t mass_from(const Drawn& drawn, float largest, uint32_t low) {
    uint64_t mass = 0;
    for_tokens(drawn, [&](int, float s) {
      if (key_of(s) >= low) mass += mass_of(s, largest);
    });
    return reduction_.all(mass, Add{});
  }

  // The least key ≥ `low` above which lies less than `enough`: mass, or a number of tokens. `low` if that is not all.
  __device__ uint32_t cut_at(const Drawn& drawn, float largest, uint32_t low, Weight weight, uint64_t enough) {
    uint32_t high = key_of(largest);
    while (low < high) {
      // The top bucket is 0; a bucket is 2^shift keys wide.
      const int shift = max(0, 24 - __clz(int(high - low)));
      fill_buckets(drawn, largest, low, high, shift, weight);
      const Crossing crossing = find_crossing(enough);
      if (crossing.bucket == kBuckets) return low;
      enough -= crossing.above;
      high -= crossing.bucket << shift;
      low = max(low, high - min(high, (1u << shift) - 1));
      if (shift == 0) break;
      list_from(drawn, low);
    }
    return high;
  }

  __device__ void fill_buckets(const Drawn& drawn, float largest, uint32_t low, uint32_t high, int shift,
                               Weight weight) {
    uint32_t* const low_words = room_.low_words[turn_];
    uint32_t* const high_words = room_.high_words[turn_];
    for (int i = threadIdx.x; i < kBuckets; i += kThreads) low_words[i] = high_words[i] = 0;
    __syncthreads();
    for_tokens(drawn, [&](int, float s) {
      const uint32_t key = key_of(s);
      if (key < low || key > high) return;
      const uint32_t bucket = (high - key) >> shift;
      const uint64_t added = weight == Weight::kMass ? mass_of(s, largest) : 1;
      // A sum of integers is the same in any order. 64-bit atomics in shared memory are slow, so carry by hand.
      const uint32_t word = uint32_t(added), before = atomicAdd(&low_words[bucket], word);
      const uint32_t rest = uint32_t(added >> 32) + uint32_t(before + word < word);
      if (rest != 0) atomicAdd(&high_words[bucket], rest);
    });
  }

  // Thread b has bucket b of all blocks.
  __device__ Crossing find_crossing(uint64_t enough) {
    Cluster::sync();
    const int bucket = threadIdx.x, lane = threadIdx.x % 32;
    uint64_t weight = 0, until = 0;
    if (bucket < kBuckets) {
      for (int rank = 0; rank < Cluster::size(); ++rank)
        weight += uint64_t(*Cluster::in_block(&room_.high_words[turn_][bucket], rank)) << 32 |
                  *Cluster::in_block(&room_.low_words[turn_][bucket], rank);
      until = weight;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const uint64_t before = __shfl_up_sync(0xFFFFFFFFu, until, distance);
        if (lane >= distance) until += before;
      }
      if (lane == 31) room_.weight_of_warp[bucket / 32] = until;
    }
    __syncthreads();
    if (bucket < kBuckets) {
      for (int warp = 0; warp < bucket / 32; ++warp) until += room_.weight_of_warp[warp];
      const uint64_t above = until - weight;
      if (above < enough && until >= enough) room_.crossing = {above, uint32_t(bucket)};
      if (bucket == kBuckets - 1 && until < enough) room_.crossing = {0, kBuckets};
    }
    __syncthreads();
    turn_ ^= 1;
    return room_.crossing;
  }

  // The largest score s + noise among tokens from `cut` on.
  __device__ Winner by_noise(const Drawn& drawn, float largest, uint32_t cut) {
    const NoiseKey key = noise_.key(seed_, drawn.stream);
    list_from_cut_if_any(drawn, cut);
    // The largest logit scores more than this, so does the winner.
    const float bound = largest + kLeastGumbel;
    Winner mine;
    const auto score = [&](int place, float s, uint32_t bits) {
      const float best = fmaxf(bound, mine.score);
      if (may_win(s, bits, best)) mine.take(s + gumbel<float>(bits), uint32_t(first_ + place));
    };
    if (is_listed_) {
      for_tokens(drawn, [&](int place, float s) {
        if (key_of(s) >= cut) score(place, s, noise_bits(key, first_ + place));
      });
    } else {
      for_groups(drawn, [&](int place, const float (&s)[kGroupTokens]) {
        const float top = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]));
        if (key_of(top) < cut || top + float(kLargestGumbel) < fmaxf(bound, mine.score)) return;
        const PhiloxBlock noise = philox(key.counter(uint32_t(first_ + place) / 4), key.seed);
#pragma unroll
        for (int j = 0; j < kGroupTokens; ++j)
          if (key_of(s[j]) >= cut) score(place + j, s[j], noise.words[j]);
      });
    }
    return reduction_.all(mine, MergeWinners{});
  }

  // Where something was cut off, a list saves the noise of the tokens beside those kept.
  __device__ void list_from_cut_if_any(const Drawn& drawn, uint32_t cut) {
    if (cut > key_of(-INFINITY) + 1) list_from(drawn, cut);
  }

  // Whether s + gumbel(bits) may be `best` or more: −log(1 − u) ≥ u, so the noise is −log u at most. Errs towards yes.
  __device__ static bool may_win(float s, uint32_t bits, float best) {
    const float slack = 1e-3f + fabsf(best) * 1e-6f;
    return s - __logf(uniform<float>(bits)) + slack >= best;
  }

  __device__ void write(uint32_t token, uint32_t draft, const Decision& decision, float logp, float base_logp) const {
    arguments_.token[row_] = token == kNoToken ? -1 : int64_t(token);
    arguments_.draft_token[row_] = draft == kNoToken ? -1 : int64_t(draft);
    arguments_.selected[row_] = decision.selected != 0;
    arguments_.delta_logp[row_] = decision.delta_logp;
    arguments_.logp[row_] = logp;
    arguments_.base_logp[row_] = base_logp;
  }

  const SampleArguments& arguments_;
  const int64_t row_;
  const int slices_;        // of this block
  const int slice_groups_;  // of each
  const int first_;         // token of this block
  SampleRoom& room_;
  Reduction reduction_;
  Part z_, base_;
  RowNoise noise_;
  uint64_t seed_;
  RowMaxima maxima_;
  bool is_listed_ = false;
  int turn_ = 0;  // which copy of the buckets
};

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dlogp_shared[];
  return dlogp_shared;
}

// What a launcher tells the kernel, besides the caller's arguments.

inline SampleArguments completed(SampleArguments arguments) {
  arguments.aligned = arguments.logits.has_aligned_groups();
  arguments.base_aligned = arguments.base_logits.has_aligned_groups();
  return arguments;
}

// Logits are kept as they are, or as float where the two models differ.
inline LogitType kept_type(const SampleArguments& arguments) {
  return arguments.logits.type == arguments.base_logits.type ? arguments.logits.type : LogitType::kFloat;
}

inline int slice_tokens(int64_t vocabulary) {
  const int64_t slice = (vocabulary + kSlices - 1) / kSlices;
  return int((slice + kGroupTokens - 1) / kGroupTokens * kGroupTokens);
}

// What this architecture needs: with clusters parts are kept, and only a vocabulary that is too large for that is read
// again and again, of whatever type, as float.
template <typename Stored, bool kKept>
__device__ constexpr bool is_needed() {
#if __CUDA_ARCH__ >= 900
  return kKept || std::is_same_v<Stored, float>;
#else
  return !kKept;
#endif
}

// Block i of the grid is block i mod C of the cluster, of C blocks, that samples row i / C.
template <typename Stored, bool kKept>
__global__ void __launch_bounds__(kThreads, 2)
    extrapolated_sample_kernel(const __grid_constant__ SampleArguments arguments, int slice_tokens) {
  if constexpr (is_needed<Stored, kKept>()) RowSampler<Stored, kKept>(arguments, slice_tokens, dynamic_shared()).run();
}

}  // namespace dlogp
