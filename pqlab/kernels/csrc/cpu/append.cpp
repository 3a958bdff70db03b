// The storing half of `append_` (kernels/ops.py): one new token a row goes to its sink or to its slot of the ring.
// A flush, once per page, is an `encode_pages_` that cpu.py calls afterwards.
#include <cstring>

#include "api.h"

extern "C" int pq_append(const pq_append_args* args) {
    const pq_append_args& a = *args;
    bool flush = false;
    for (int64_t row = 0; row < a.batch; row++) {
        const int32_t *old = a.before + row * 3, *now = a.after + row * 3;
        const int64_t token = int64_t(old[0]) + old[1] + old[2];
        if (token < 0 || (token >= a.num_sinks && a.window_slots == 0)) return PQ_BAD_LENGTHS;
        if (int64_t(now[0]) + now[1] + now[2] == token) continue;  // a pad: nothing to store
        flush |= now[1] != old[1];
        const bool sink = token < a.num_sinks;
        const int64_t slots = sink ? a.num_sinks : a.window_slots;
        const int64_t place = sink ? token : (token - a.num_sinks) % a.window_slots;
        for (int64_t head = row * a.heads; head < (row + 1) * a.heads; head++) {
            const int64_t to = (head * slots + place) * a.vector_bytes, from = head * a.vector_bytes;
            std::memcpy((sink ? a.sink_k : a.window_k) + to, a.k + from, size_t(a.vector_bytes));
            std::memcpy((sink ? a.sink_v : a.window_v) + to, a.v + from, size_t(a.vector_bytes));
        }
    }
    return flush ? PQ_FLUSH : PQ_OK;
}
