// Launchers of pq_encode and pq_append for one configuration, given by macros (pqlab/kernels/cuda_config.py sets them):
//   PQ_DM dimensions a subspace | PQ_NBITS bits a code (8 or 4) | PQ_T element type of the vectors
// Every function returns null, or a message that stays valid for the life of the process.
#include "pq_append.cuh"
#include "pq_find.cuh"
#include "pq_launch.cuh"

namespace {

constexpr int kCentroids = 1 << PQ_NBITS;
constexpr int kSmem = pqlab::kEncodeWarps * kCentroids * (PQ_DM + 1) * 4;
constexpr int kFew = kCentroids >= 64 ? 8 : 2;  // threads a tile where there are few tokens

unsigned ceil_div(int a, int b) { return (a + b - 1) / b; }

using Table = std::conditional<PQ_DM == 1, pqlab::Line, pqlab::Grid>::type;

// Whether the tokens are many enough to be worth a table of every subspace, and their vectors lie well for it.
bool takes_tables(const pqlab::EncodeParams& p) {
  const uintptr_t x = reinterpret_cast<uintptr_t>(p.x), bytes = sizeof(PQ_T);
  const bool aligned = (x | p.x_stride[0] * bytes | p.x_stride[1] * bytes) % 16 == 0 && p.M % Table::together == 0 &&
                       reinterpret_cast<uintptr_t>(p.books) % (4 * Table::dims) == 0;
  return PQ_DM == Table::dims && kCentroids == 256 && p.n > Table::many && aligned;
}

[[maybe_unused]] const char* make_tables(const float* books, pqlab::Grid* tables, int count, void* stream) {
  const float2* const points = reinterpret_cast<const float2*>(books);
  return pqlab::launch(pqlab::pq_grid_kernel, dim3(count), pqlab::kGridThreads, 0, stream, points, tables);
}
[[maybe_unused]] const char* make_tables(const float* books, pqlab::Line* tables, int count, void* stream) {
  return pqlab::launch(pqlab::pq_line_kernel, dim3(count), pqlab::kLineThreads, 0, stream, books, tables);
}

const char* encode_by_tables(const pqlab::EncodeParams& p, Table* tables, void* stream) {
  const dim3 grid(ceil_div(p.n, 8 * pqlab::kFindThreads), p.M / Table::together, p.G);
  const auto kernel = pqlab::pq_find_kernel<PQ_T, Table>;
  constexpr int smem = Table::together * sizeof(Table);
  if (const char* m = pqlab::allow_smem(kernel, smem)) return m;
  if (const char* m = make_tables(p.books, tables, p.G * p.M, stream)) return m;
  const Table* const made = tables;
  return pqlab::launch(kernel, grid, pqlab::kFindThreads, smem, stream, p, made);
}

}  // namespace

// Bytes of the memory, aligned to 16, that pqlab_encode needs for this call.
PQ_API int64_t pqlab_encode_room(const pqlab::EncodeParams* p) {
  return takes_tables(*p) ? static_cast<int64_t>(sizeof(Table)) * p->G * p->M : 0;
}

PQ_API const char* pqlab_encode(const pqlab::EncodeParams* params, void* room, void* stream) {
  const pqlab::EncodeParams& p = *params;
  if (p.n == 0 || p.G == 0) return nullptr;
  if (p.page_ids && reinterpret_cast<uintptr_t>(p.codes) & 15) return "pages must be aligned to 16 bytes";
  if (takes_tables(p)) return encode_by_tables(p, static_cast<Table*>(room), stream);
  const int tiles = ceil_div(p.first_slot % 16 + p.n, 16);
  const bool few = p.n <= 2048;
  const auto kernel = few ? pqlab::pq_encode_kernel<PQ_T, PQ_DM, PQ_NBITS, kFew>
                          : pqlab::pq_encode_kernel<PQ_T, PQ_DM, PQ_NBITS, 1>;
  const dim3 grid(ceil_div(tiles, few ? 32 / kFew : 32), ceil_div(p.M, pqlab::kEncodeWarps), p.G);
  if (const char* m = pqlab::allow_smem(kernel, kSmem)) return m;
  return pqlab::launch(kernel, grid, pqlab::kEncodeWarps * 32, kSmem, stream, p);
}

PQ_API const char* pqlab_append(const pqlab::AppendParams* params, void* stream) {
  pqlab::AppendParams p = *params;
  if (p.B == 0) return nullptr;
  if (p.maps && (p.D % pqlab::kMapSlice || p.D > pqlab::kMapMost)) return "maps are for head sizes that are multiples of 32, up to 256";
  for (const void* map : {p.side[0].map, p.side[1].map, static_cast<const void*>(p.q_map)})
    if (reinterpret_cast<uintptr_t>(map) & 15) return "maps must be aligned to 16 bytes";
  const int tokens = pqlab::map_chunks(p.B), queries = pqlab::map_chunks(p.B * p.G * p.S);
  const int chunks = (p.side[0].map ? tokens : 0) + (p.side[1].map ? tokens : 0);
  p.query_blocks = p.maps && p.q_map ? queries * p.H * (p.D / pqlab::kTransposedSlice) : 0;
  p.span_inverse = 1.f / (p.B * p.G * p.S);
  if (p.maps && p.turns) {
    if (!p.q_map || p.D > pqlab::kAskedMost) return "keys with anchors have a map, and heads up to 256";
    if (static_cast<int64_t>(p.spans) * p.B * p.G * p.S >= 1 << 21) return "too many queries for one launch";
    p.query_blocks = pqlab::asked_blocks(p);
  }
  p.map_blocks = p.query_blocks + (p.maps ? chunks * p.H * (p.D / pqlab::kMapSlice) : 0);
  p.shares = ceil_div(p.M, pqlab::kAppendWarps * pqlab::kAppendRounds);
  p.slices_inverse = static_cast<float>(pqlab::kMapSlice) / p.D, p.heads_inverse = 1.f / p.H;
  p.rows_inverse = 1.f / (p.B * p.H), p.shares_inverse = 1.f / p.shares, p.slots_inverse = 1.f / p.slots;
  p.each_inverse = 1.f / (p.G * p.S), p.steps_inverse = 1.f / p.S;
  const dim3 grid(p.map_blocks + p.sides * p.B * p.H * p.shares);
  if (grid.x >= 1u << 21) return "too many rows for one launch";  // of pqlab::divide
  const auto kernel = pqlab::pq_append_kernel<PQ_T, PQ_DM, PQ_NBITS, kFew>;
  constexpr int smem = pqlab::kAppendSmem<PQ_DM, kCentroids>;
  if (const char* m = pqlab::allow_smem(kernel, smem)) return m;
  return pqlab::launch(kernel, grid, pqlab::kAppendWarps * 32, smem, stream, p);
}
