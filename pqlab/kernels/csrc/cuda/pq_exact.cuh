// Sinks and window: few tokens, by plain arithmetic of the value warps while codebooks are on their way. No torch.
#pragma once
#include "pq_lookup.cuh"

namespace pqlab {

// A warp takes every NP-th token of the block's [e0, e1), AT_ONCE at a time; the last warp begins, since the first ones
// have codes where those are few. DIM::of(word, lane) and the next are the dimensions a lane owns, for U words.
template <typename Cfg, int U, typename DIM>
struct ExactTokens {
  using T = typename Cfg::T;
  static constexpr int HG = Cfg::HG, NP = Cfg::NP, AT_ONCE = Cfg::EXACT;

  int sinks, oldest;  // slot of the oldest token of the window
  int coded;          // code index of that token
  int next, end;      // token to be read next
  Raw<T> k[AT_ONCE][U] = {}, v[AT_ONCE][U] = {}, q[HG][U] = {};  // or the compiler keeps those of the row before
  float more[HG] = {};  // of anchored keys: what is added to the scores of a query

  // Asks for the first of them.
  __device__ __forceinline__ ExactTokens(const DecodeParams& p, const Place<Cfg>& at, const Row& row, int b, int e0,
                                         int e1)
      : sinks(row.sinks), oldest(0), coded(row.coded), next(e0 + NP - 1 - at.pair), end(e1) {
    if (next >= end) return;
    if (p.window_slots) oldest = static_cast<uint32_t>(row.coded) % p.window_slots;
    read_tokens(p, at, b);
    read_query(p, at, b);
  }
  // Span of a token: that of its code index, the first of a sink.
  __device__ __forceinline__ int span_of(const DecodeParams& p, int token) const {
    return token < sinks ? 0 : p.span_of(coded + token - sinks);
  }
  // The first token behind this one that is in another span, at least where that begins.
  __device__ __forceinline__ int border(const DecodeParams& p, int token) const {
    const int index = token < sinks ? 0 : coded + token - sinks;
    return max(sinks, (((index >> p.span_shift) + 1) << p.span_shift) - coded + sinks);
  }
  // The query vectors for the next token.
  __device__ __forceinline__ void read_query(const DecodeParams& p, const Place<Cfg>& at, int b) {
    const int span = Cfg::ANCHORED ? span_of(p, next) : 0;
#pragma unroll
    for (int g = 0; g < HG; ++g) {
      read(at, at.query(p, b, g, span), q[g]);
      if constexpr (Cfg::ANCHORED) more[g] = at.offset(p, b, g, span);
    }
  }

  __device__ __forceinline__ void read(const Place<Cfg>& at, const T* from, Raw<T> (&x)[U]) const {
#pragma unroll
    for (int w = 0; w < U; ++w) {
      const int dim = DIM::of(w, at.lane);
      x[w] = {};
      if (dim < Cfg::D) x[w] = load_raw(from + dim);
    }
  }
  // Key and value of a token, the first of its dimensions.
  __device__ __forceinline__ void find(const DecodeParams& p, const Place<Cfg>& at, int b, int token, const T*& key,
                                       const T*& value) const {
    const bool sink = token < sinks;
    const int turned = oldest + token - sinks, slot = turned < p.window_slots ? turned : turned - p.window_slots;
    const int64_t* st = sink ? p.sink_stride : p.window_stride;
    const int64_t from = b * st[0] + at.h * st[1] + (sink ? token : slot) * st[2];
    key = static_cast<const T*>(sink ? p.sink_k : p.window_k) + from;
    value = static_cast<const T*>(sink ? p.sink_v : p.window_v) + from;
  }
  // The next tokens to registers, and those behind them to L2.
  __device__ __forceinline__ void read_tokens(const DecodeParams& p, const Place<Cfg>& at, int b) {
    const T *key, *value;
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      find(p, at, b, min(next + NP * j, end - 1), key, value);
      read(at, key, k[j]);
      read(at, value, v[j]);
    }
    constexpr int lines = (Cfg::D * static_cast<int>(sizeof(T)) + 127) / 128;  // of a vector; a lane takes one
    const int token = next + NP * (AT_ONCE + at.lane / (2 * lines));
    if (at.lane < 2 * lines * AT_ONCE && token < end) {
      find(p, at, b, token, key, value);
      prefetch_l2(reinterpret_cast<const char*>(at.lane & 1 ? value : key) + at.lane / 2 % lines * 128);
    }
  }

  // sum(word, 0 or 1, g) is a reference to what the lane sums up.
  template <typename SUM>
  __device__ __forceinline__ void attend(const DecodeParams& p, const Place<Cfg>& at, int b, float (&top)[HG],
                                         float (&total)[HG], SUM&& sum) {
#pragma unroll 1
    while (next < end) {
      float2 kf[AT_ONCE][U], vf[AT_ONCE][U];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
        for (int w = 0; w < U; ++w) kf[j][w] = to_float2(k[j][w]), vf[j][w] = to_float2(v[j][w]);
      const int now = next;
      int upto = end, taken = AT_ONCE;
      if constexpr (Cfg::ANCHORED) {  // no further than to the end of the span
        upto = min(end, border(p, now));
        taken = min(AT_ONCE, (upto - now + NP - 1) / NP);
      }
      next += NP * taken;
      if (next < end) read_tokens(p, at, b);
#pragma unroll
      for (int g = 0; g < HG; ++g) {
        float2 qf[U];
#pragma unroll
        for (int w = 0; w < U; ++w) qf[w] = to_float2(q[g][w]);
        float s[AT_ONCE], best = top[g];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          s[j] = 0.f;
#pragma unroll
          for (int w = 0; w < U; ++w) s[j] += qf[w].x * kf[j][w].x + qf[w].y * kf[j][w].y;
#pragma unroll
          for (int o = 16; o; o >>= 1) s[j] += __shfl_xor_sync(~0u, s[j], o);
          if constexpr (Cfg::ANCHORED) s[j] += more[g];
          s[j] = now + NP * j < upto ? s[j] * p.scale_log2 : -INFINITY;
          best = fmaxf(best, s[j]);
        }
        const float shrink = exp2_approx(top[g] - best);
        top[g] = best;
        total[g] *= shrink;
#pragma unroll
        for (int w = 0; w < U; ++w) sum(w, 0, g) *= shrink, sum(w, 1, g) *= shrink;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          const float weight = exp2_approx(s[j] - best);
          if (at.lane == 0) total[g] += weight;
#pragma unroll
          for (int w = 0; w < U; ++w) sum(w, 0, g) += weight * vf[j][w].x, sum(w, 1, g) += weight * vf[j][w].y;
        }
      }
      if constexpr (Cfg::ANCHORED)
        if (next < end && span_of(p, next) != span_of(p, now)) read_query(p, at, b);
    }
  }
};

}  // namespace pqlab
