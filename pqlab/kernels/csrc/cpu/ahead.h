// Fetching memory ahead of its use.
#pragma once
#include "vec.h"

namespace pq {

// 3: into L1, 2: into L2. On AMD (Zen 4) what comes from L2 costs 15 % of a cold call; on Intel L1 has not been tried.
#ifdef PQ_ZEN
constexpr int FETCH_LEVEL = 3;
#else
constexpr int FETCH_LEVEL = 2;
#endif

// Memory that will be wanted soon: `count` tiles of `bytes` bytes, fetched bit by bit between other work. Pages lie
// anywhere, so the hardware sees no pattern; without this the loops wait for memory half of the time.
struct Ahead {
    const uint8_t* const* tiles;
    int64_t count, bytes;
    int64_t at = 0;

    // How many lines each of `calls` calls has to fetch.
    int64_t share(int64_t calls) const { return (count * ((bytes + 63) / 64) + calls - 1) / calls; }

    PQ_INLINE void fetch(int64_t lines) {
        for (; lines > 0 && count > 0; lines--) {
            __builtin_prefetch(*tiles + at, 0, FETCH_LEVEL);
            at += 64;
            if (at >= bytes) at = 0, tiles++, count--;
        }
    }
};

// Two of them, one after the other, spread evenly over the turns of an inner loop: more at a time than a core has
// buffers for (10 to 24) would hold up the loads behind them.
struct Aheads {
    static constexpr int64_t LINE = 256;  // of `due`
    Ahead now, later;
    int64_t rate, due = 0;  // rate: what falls due with a turn

    Aheads(const Ahead& first, const Ahead& second, int64_t turns)
        : now(first), later(second), rate(((first.share(1) + second.share(1)) * LINE + turns - 1) / turns) {}
    PQ_INLINE void fetch() {
        due += rate;
        if (due < LINE) return;
        if (now.count == 0) {
            now = later;
            later.count = 0;
        }
        now.fetch(due / LINE);
        due %= LINE;
    }
};

}  // namespace pq
