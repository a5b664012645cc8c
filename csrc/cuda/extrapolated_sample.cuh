// Selective token replacement with extrapolation: the kernel.
//
//   draft ~ filter(softmax(z_draft / T));  selected by the criterion at temperature 1 over the whole vocabulary
//   token ~ filter(softmax(((1 + γ) z_R − γ z_B) / T)) if selected, else the draft
//
// logits, base_logits (rows, V) of bfloat16, float16 or float32, any strides → outputs (rows,). A cluster samples one
// row; each of its blocks reads its part of both models' logits from memory once and keeps it in shared memory, where
// they fit. float32. Deterministic: a sum of floats has one order, whatever the size of the cluster, masses that a
// filter adds are integers, and a draw is a maximum.
//
// Walks over the logits and barriers of the cluster: without a filter one of each for statistics and draft together,
// and one of each for a replacement. With filters a draw is a walk that bounds what they keep, and one that lists it,
// each with a barrier; the few tokens that are left are told to all blocks, and each of them finishes by itself.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cluster.cuh"
#include "contest.cuh"
#include "extrapolated_sample.h"
#include "logits.cuh"
#include "sample_room.cuh"
#include "softmax_sums.cuh"
#include "weight_buckets.cuh"

namespace dlogp {

// Groups that a thread fetches ahead of what it works on.
constexpr int kAhead = 4;

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
        sums_(room_.sums),
        values_(room_.values),
        z_(z_in_memory(), first_ / kGroupTokens, kept_groups(shared)),
        base_(base_in_memory(), first_ / kGroupTokens, kept_groups(shared) + groups()),
        buckets_(room_.buckets) {}

  __device__ void run() {
    Cluster::arrive();
    if (threadIdx.x == 0) {
      room_.noise = noise();
      room_.reached[0] = room_.reached[1] = kKeyOfNothing;
    }
    __syncthreads();
    const Draft draft = needs_all_sums(options().criterion) ? read<true>() : read<false>();
    if (can_draw_) {
      sample(draft);
    } else if (writes()) {
      write(kNoToken, kNoToken, {0, NAN}, NAN, NAN);
    }
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
  __device__ SharedNoise noise() const {
    const uint64_t seed = arguments_.seed != nullptr ? uint64_t(*arguments_.seed) : arguments_.options.seed;
    return {uint32_t(seed), uint32_t(seed >> 32), arguments_.identities.of(row_)};
  }
  __device__ const SampleOptions& options() const { return arguments_.options; }
  __device__ const Filters& filters() const { return options().filters; }
  __device__ int groups() const { return slices_ * slice_groups_; }
  __device__ bool writes() const { return Cluster::rank() == 0 && threadIdx.x == 0; }
  __device__ bool greedy() const { return options().temperature == 0; }
  __device__ bool by_rank() const { return filters().limits_rank(arguments_.vocabulary); }
  // A draw that nothing has to precede.
  __device__ bool draws_at_once() const { return !greedy() && !filters().any(arguments_.vocabulary); }

  // Of a thread's groups, slice by slice.
  struct Cursor {
    int slice, index;
  };
  __device__ Cursor first_group() const { return {int(threadIdx.x) < slice_groups_ ? 0 : slices_, int(threadIdx.x)}; }
  __device__ void advance(Cursor& at) const {
    at.index += kThreads;
    if (at.index < (at.slice + 1) * slice_groups_) return;
    ++at.slice;
    at.index = at.slice * slice_groups_ + int(threadIdx.x);
  }
  __device__ void fetch_next(const RowInMemory& z_row, const RowInMemory& base_row, Cursor& ahead) {
    if (ahead.slice < slices_) {
      const int number = first_ / kGroupTokens + ahead.index;
      if (number < z_row.whole_groups<Stored>()) z_.fetch(z_row, number, ahead.index);
      if (number < base_row.whole_groups<Stored>()) base_.fetch(base_row, number, ahead.index);
      advance(ahead);
    }
    __pipeline_commit();
  }
  // What fetch_next leaves out.
  __device__ void gather_rest(const RowInMemory& z_row, const RowInMemory& base_row) {
#pragma unroll 1
    for (Cursor at = first_group(); at.slice < slices_; advance(at)) {
      const int number = first_ / kGroupTokens + at.index;
      if (number >= z_row.whole_groups<Stored>()) z_.gather(z_row, number, at.index);
      if (number >= base_row.whole_groups<Stored>()) base_.gather(base_row, number, at.index);
    }
  }

  __device__ Group drafted_group(int index) const {
    // A choice of the address where it can be one, and not between two loads.
    if constexpr (kKept) return (options().draft_from_base ? base_ : z_).group(index);
    return options().draft_from_base ? base_.group(index) : z_.group(index);
  }

  // The one walk through memory: what is there is kept and summed up, and drawn from if that can be.
  template <bool kAll>
  __device__ Draft read() {
    const Drawn drawn = drawn_for_draft();
    Contest contest(drawn, room_.noise, &room_.reached[0]);
    const bool draws = draws_at_once();
    const RowInMemory z_row = z_in_memory(), base_row = base_in_memory();
    Cursor ahead = first_group();
    for (int i = 0; i < kAhead; ++i) fetch_next(z_row, base_row, ahead);
    gather_rest(z_row, base_row);
    float largest = -INFINITY;
    for (int slice = 0; slice < slices_; ++slice) {
      ThreadSums<kAll> thread_sums;
      const int end = (slice + 1) * slice_groups_;
#pragma unroll 1
      for (int i = slice * slice_groups_ + int(threadIdx.x); i < end; i += kThreads) {
        __pipeline_wait_prior(kAhead - 1);
        thread_sums.add(z_.group(i), base_.group(i));
        fetch_next(z_row, base_row, ahead);
        if (draws) contest.add(token_of(i * kGroupTokens), drafted_group(i));
      }
      const SoftmaxSums<kAll> sums = thread_sums.sums();
      largest = fmaxf(largest, options().draft_from_base ? sums.base_max : sums.max);
      sums_.add(slice, sums, MergeSums<kAll>{});
    }
    values_.add(0, Draft{contest.winner(), extent_of_block(drawn.scaled(largest))}, MergeDrafts{});
    __syncthreads();
    Cluster::wait();  // now every block has begun, and can be written to
    sums_.template tell<SoftmaxSums<kAll>>(slices_, MergeSums<kAll>{});
    values_.template tell<Draft>(1, MergeDrafts{});
    Cluster::sync();
    const auto sums = sums_.template total<SoftmaxSums<kAll>>(slices_, MergeSums<kAll>{});
    can_draw_ = sums.can_draw();
    if (threadIdx.x == 0) room_.state = sums.state();
    __syncthreads();
    return values_.template total<Draft>(1, MergeDrafts{});
  }

  // The draft, and a second turn for its replacement.
  __device__ void sample(const Draft& first) {
    uint32_t draft = kNoToken, token = kNoToken;
    Decision decision = {1, 0};
#pragma unroll 1
    for (int turn = 0; turn < 2 && decision.selected != 0; ++turn) {
      if (turn == 0 && draws_at_once())
        token = first.winner.token;
      else
        token = draw(turn == 0 ? drawn_for_draft() : drawn_for_replacement(), first.extent).token;
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
      seeded.seed = room_.noise.seed();
      room_.decision = {is_selected(seeded, state, delta_logp, room_.noise.row), delta_logp};
    }
    __syncthreads();
    return room_.decision;
  }

  __device__ Drawn drawn(Drawn::From from, Stream stream, float gamma, float least_base) const {
    const float temperature = greedy() ? 1.0f : float(options().temperature);
    return {from, stream, gamma, least_base, temperature, 1.0f / temperature};
  }
  __device__ Drawn drawn_for_draft() const {
    return drawn(options().draft_from_base ? Drawn::From::kBase : Drawn::From::kModel, Stream::kDraft, 0, 0);
  }
  __device__ Drawn drawn_for_replacement() {
    if (options().gamma == 0) return drawn(Drawn::From::kModel, Stream::kReplacement, 0, 0);
    const float least_base = room_.state.model_unsupported ? least_base_of_row() : 0;
    return drawn(Drawn::From::kExtrapolation, Stream::kReplacement, float(options().gamma), least_base);
  }
  __device__ float least_base_of_row() {
    Extent minus;  // of −z_B
    for (int i = threadIdx.x; i < groups(); i += kThreads) {
      const Group base = base_.group(i);
      for (const float z : base.z)
        if (z > -INFINITY) minus.largest = fmaxf(minus.largest, -z);
    }
    return -values_.of_cluster(minus, MergeExtents{}).largest;
  }

  __device__ uint32_t token_of(int place) const { return uint32_t(first_ + place); }

  // Calls use(place, z) for the part's groups of four tokens, before the division by T; −inf beyond the vocabulary.
  template <typename Use>
  __device__ void for_groups(const Drawn& drawn, Use use) const {
    const int count = groups();
#pragma unroll 1  // four at a time are enough, and this loop is in many places
    for (int i = threadIdx.x; i < count; i += kThreads) use(i * kGroupTokens, unscaled_group(drawn, i));
  }
  __device__ Group unscaled_group(const Drawn& drawn, int index) const {
    if (drawn.from == Drawn::From::kModel) return z_.group(index);
    Group group = base_.group(index);
    if (drawn.from == Drawn::From::kBase) return group;
    const Group z = z_.group(index);
#pragma unroll
    for (int j = 0; j < kGroupTokens; ++j) group.z[j] = drawn.unscaled(z.z[j], group.z[j]);
    return group;
  }

  // Calls use(token, s) for the tokens that are gathered or listed.
  template <typename Use>
  __device__ void for_left(const Drawn& drawn, Use use) const {
    const uint32_t most = kGathered / Cluster::size(), count = is_gathered_ ? kGathered : room_.listed;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      if (!is_gathered_) {
        const Candidate one = listed(drawn, i);
        use(one.token, one.s);
      } else if (i % most < room_.told_by[i / most]) {
        use(room_.gathered[i].token, room_.gathered[i].s);
      }
    }
  }
  __device__ Candidate listed(const Drawn& drawn, uint32_t index) const {
    const int place = int(room_.list[index]);
    const float z = z_.at(place), base = base_.at(place);
    return {token_of(place), drawn.scaled(drawn.unscaled(z, base))};
  }

  // Lists the tokens from `low` on, if they are few enough. Their order does not matter to what follows.
  __device__ void list_from(const Drawn& drawn, uint32_t low) {
    if (is_listed_) return;
    if (threadIdx.x == 0) room_.listed = 0;
    __syncthreads();
    const float least = of_key(low), about_least = least - 1e-3f - fabsf(least) * 1e-6f;
    for_groups(drawn, [&](int place, const Group& z) {
      if (drawn.about_scaled(z.largest()) < about_least) return;
      bool kept[kGroupTokens];
      uint32_t count = 0;
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) count += kept[j] = drawn.scaled(z.z[j]) >= least;
      if (count == 0 || *static_cast<volatile uint32_t*>(&room_.listed) > kListed) return;
      uint32_t at = atomicAdd(&room_.listed, count);
      if (at + count > kListed) return;
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j)
        if (kept[j]) room_.list[at++] = uint32_t(place + j);
    });
    __syncthreads();
    is_listed_ = room_.listed <= kListed;
    __syncthreads();  // the next list may begin
  }

  // Tells all blocks the tokens from `low` on, if they are few enough; from then on each block works for itself.
  __device__ void gather_from(const Drawn& drawn, uint32_t low) {
    if (is_gathered_) return;
    list_from(drawn, low);
    const uint32_t blocks = Cluster::size(), most = kGathered / blocks;
    if (threadIdx.x == 0) room_.told = is_listed_ ? 0 : most + 1;
    __syncthreads();
    for (uint32_t i = threadIdx.x; is_listed_ && i < room_.listed; i += kThreads) {
      const Candidate one = listed(drawn, i);
      if (key_of(one.s) < low) continue;
      const uint32_t at = atomicAdd(&room_.told, 1u);
      if (at >= most) continue;
      Candidate& mine = room_.gathered[Cluster::rank() * most + at];
      for (uint32_t rank = 0; rank < blocks; ++rank) *Cluster::in_block(&mine, int(rank)) = one;
    }
    __syncthreads();
    if (threadIdx.x < blocks) *Cluster::in_block(&room_.told_by[Cluster::rank()], int(threadIdx.x)) = room_.told;
    Cluster::sync();
    is_gathered_ = true;
    for (uint32_t rank = 0; rank < blocks; ++rank) is_gathered_ &= room_.told_by[rank] <= most;
  }

  __device__ Winner draw(const Drawn& drawn, const Extent& of_draft) {
    is_listed_ = is_gathered_ = false;
    if (greedy()) return first_largest(drawn);
    uint32_t cut = kLeastKey;
    if (!draws_at_once()) {
      cut = least_kept(drawn, drawn.stream == Stream::kDraft ? of_draft : extent_of(drawn));
      if (cut > kLeastKey && !is_gathered_) list_from(drawn, cut);
    }
    return by_noise(drawn, cut);
  }

  __device__ Winner first_largest(const Drawn& drawn) {
    Winner mine;
    for_groups(drawn, [&](int place, const Group& z) {
      if (z.largest() < mine.score) return;
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) mine.take(z.z[j], token_of(place + j));
    });
    return values_.of_cluster(mine, MergeWinners{});
  }

  // The largest score among tokens from `cut` on.
  __device__ Winner by_noise(const Drawn& drawn, uint32_t cut) {
    Contest contest(drawn, room_.noise, &room_.reached[drawn.stream == Stream::kDraft ? 0 : 1]);
    if (is_gathered_ || is_listed_) {
      for_left(drawn, [&](uint32_t token, float s) {
        if (key_of(s) >= cut) contest.add(token, s);
      });
    } else {
      for_groups(drawn, [&](int place, Group z) {
        if (cut > kLeastKey)
          for (float& one : z.z) one = key_of(drawn.scaled(one)) >= cut ? one : -INFINITY;
        contest.add(token_of(place), z);
      });
    }
    return is_gathered_ ? values_.of_block(contest.winner(), MergeWinners{})
                        : values_.of_cluster(contest.winner(), MergeWinners{});
  }

  // The statistics of what is drawn from, if that is a model.
  __device__ const SoftmaxState<float>& state_of(const Drawn& drawn) const {
    return drawn.from == Drawn::From::kBase ? room_.state.base : room_.state.model;
  }

  // Of a replacement. Its barrier is needed anyway: no block tells anything as long as another may read what it was
  // told about the draft.
  __device__ Extent extent_of(const Drawn& drawn) {
    float largest = -INFINITY;
    for_groups(drawn, [&](int, const Group& z) { largest = fmaxf(largest, z.largest()); });
    return values_.of_cluster(extent_of_block(drawn.scaled(largest)), MergeExtents{});
  }

  // A key that top_k of the threads' largest reach is one that as many tokens do.
  __device__ Extent extent_of_block(float largest) const {
    const uint32_t key = key_of(largest);
    if (!by_rank() || filters().top_k > kThreads) return {largest, 0};
    const int enough = int(filters().top_k);
    uint32_t low = 0, high = 0xFFFFFFFFu;  // `low` is reached by enough of them
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      const int reaching = __syncthreads_count(key >= middle);
      (reaching >= enough ? low : high) = middle;
      if (reaching >= enough && reaching <= enough + enough / 4) break;
    }
    return {largest, low};
  }

  // The key of the least s that top-k, then top-p, then min-p keep.
  __device__ uint32_t least_kept(const Drawn& drawn, const Extent& extent) {
    uint32_t cut = max(kLeastKey, extent.rank_bound);
    bool few = extent.rank_bound > kLeastKey;
#pragma unroll 1  // cut_at is large
    for (const Weight weight : {Weight::kCount, Weight::kMass}) {
      if (weight == Weight::kCount ? !by_rank() : filters().top_p == 1) continue;
      if (weight == Weight::kMass && !by_rank()) cut = max(cut, key_of(extent.largest - reach_of(drawn)));
      cut = cut_at(drawn, extent.largest, cut, weight, few);
      few = false;
    }
    if (filters().min_p > 0) cut = max(cut, key_of(round_up(double(extent.largest) + log(filters().min_p))));
    return cut;
  }

  // Even if all V tokens lay so far below the largest, they would have less than 1 − p of the mass together: what lies
  // lower is not kept. A model's mass at T ≥ 1 is at least that at 1; any is at least that of the largest logit.
  __device__ float reach_of(const Drawn& drawn) const {
    const bool is_known = drawn.from != Drawn::From::kExtrapolation && drawn.temperature >= 1;
    const double mass = is_known ? fmax(1.0, state_of(drawn).sum()) : 1.0;
    return float(log(double(arguments_.vocabulary) / ((1 - filters().top_p) * mass)) + 1e-3);
  }

  __device__ static uint64_t mass_of(float e) {
    return e <= kGroupTokens ? __float2ull_rn(e * kMassOne) : 0;  // not so where logits / T overflowed into NaN
  }

  // The least key ≥ `low` above which lies less than top-k tokens, or top-p of the mass; `low` if that is not all.
  // Where the tokens from `low` on are `few`, they are gathered at once.
  __device__ uint32_t cut_at(const Drawn& drawn, float largest, uint32_t low, Weight weight, bool few) {
    uint32_t high = key_of(largest);
    uint64_t enough = weight == Weight::kCount ? uint64_t(filters().top_k) : kShare;
    while (low < high) {
      if (few) gather_from(drawn, low);
      few = true;
      // The top bucket is 0; a bucket is 2^shift keys wide.
      const int shift = max(0, 24 - __clz(int(high - low)));
      fill_buckets(drawn, largest, low, high, shift, weight, enough == kShare && !by_rank());
      const Crossing crossing = buckets_.crossing(enough, filters().top_p, is_gathered_);
      if (crossing.bucket == kBuckets) return low;
      enough = crossing.enough;
      high -= crossing.bucket << shift;
      low = max(low, high - min(high, (1u << shift) - 1));
      if (shift == 0) break;
    }
    return high;
  }

  __device__ void fill_buckets(const Drawn& drawn, float largest, uint32_t low, uint32_t high, int shift, Weight weight,
                               bool and_below) {
    buckets_.clear();
    const auto add = [&](uint32_t key, float e) {
      if (key >= low && key <= high) buckets_.add((high - key) >> shift, weight == Weight::kMass ? mass_of(e) : 1);
    };
    if (is_gathered_ || is_listed_) {
      for_left(drawn, [&](uint32_t, float s) { add(key_of(s), fast_exp(s - largest)); });
      return;
    }
    uint64_t below = 0;
    for_groups(drawn, [&](int, const Group& z) {
      float e_below = 0;
#pragma unroll
      for (int j = 0; j < kGroupTokens; ++j) {
        const float s = drawn.scaled(z.z[j]), e = fast_exp(s - largest);
        const uint32_t key = key_of(s);
        if (key < low) e_below += e;
        add(key, e);
      }
      below += mass_of(e_below);
    });
    below = across_lanes<32>(below, Add{});
    if (and_below && threadIdx.x % 32 == 0) buckets_.add(kBuckets, below);
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
  Reduction<kSlices, sizeof(SoftmaxSums<true>)> sums_;
  Reduction<1, sizeof(Draft)> values_;
  Part z_, base_;
  bool can_draw_ = false, is_listed_ = false, is_gathered_ = false;
  WeightBuckets buckets_;
};

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dlogp_shared[];
  return dlogp_shared;
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
