// attention_varlen on the CPU: the tasks of attention and of attention_decode over packed sequences, in one call of the
// threads.
// sequence  With up to kDecodeQueries queries it is one of attention_decode's, chunk by chunk of its keys, else one of
//           attention's, block by block of its rows.  Which it is, and so its rows' bits, depends on nothing beside it.
// shares    Tasks differ in size: a thread's share is a range of products, and a task belongs to the share it begins
//           in.
// workspace what is known of each sequence, then the chunks of those that attention_decode's tasks serve
#include "llmkern/attention_varlen.h"

#include "../isa.h"
#include "attention_blocks.h"
#include "attention_chunks.h"

namespace llmkern::LLMKERN_ISA {
namespace {

struct Sequence : AttentionVarlenParams::Sequence {
  int64_t tasks, cost;  // of kv_heads · chunks or blocks, in products
  int64_t start;        // products of the sequences before it
  int64_t chunks_at;    // bytes, in the workspace; -1 where attention's tasks serve it
};

constexpr int64_t to_lines_of_bytes(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

const void* moved(const AttentionVarlenParams& p, const void* from, int64_t elements) {
  return with_type(p.dtype, [&]<class T>() -> const void* { return static_cast<const T*>(from) + elements; });
}

// The cache's part that is the sequence's own: strides' "batch" is the block where paged, else nothing.
const void* cache_of(const AttentionVarlenParams& p, const void* cache, const HeadStrides& strides, int64_t b,
                     const AttentionVarlenParams::Sequence& s) {
  return moved(p, cache, p.block_table ? 0 : strides.offset(p.cu_seqlens_k ? 0 : b, 0, s.first_key));
}

void* out_of(const AttentionVarlenParams& p, int64_t first_row) {
  return const_cast<void*>(moved(p, p.out, first_row * p.out_strides.position));
}

// The sequence as a call of attention.
AttentionParams many_queries(const AttentionVarlenParams& p, int64_t b, const AttentionVarlenParams::Sequence& s) {
  return {
      .q = moved(p, p.q, s.first_row * p.q_strides.position),
      .k = cache_of(p, p.k, p.k_strides, b, s),
      .v = cache_of(p, p.v, p.v_strides, b, s),
      .out = out_of(p, s.first_row),
      .lse = p.lse ? p.lse + s.first_row : nullptr,
      .mask = nullptr,
      .key_padding = nullptr,
      .sinks = p.sinks,
      .workspace = nullptr,
      .q_strides = p.q_strides,
      .k_strides = p.k_strides,
      .v_strides = p.v_strides,
      .out_strides = p.out_strides,
      .mask_strides = {},
      .padding_strides = {},
      .batch = 1,
      .heads = p.heads,
      .kv_heads = p.kv_heads,
      .queries = s.queries,
      .keys = s.keys,
      .dim = p.dim,
      .value_dim = p.value_dim,
      .window_left = p.window_left,
      .window_right = p.window_right,
      .dtype = p.dtype,
      .mask_dtype = DType::f32,
      .sinks_dtype = p.sinks_dtype,
      .mask_is_bool = false,
      .causal = p.causal,
      .sm_scale = p.sm_scale,
      .softcap = p.softcap,
      .block_table = p.block_table ? p.block_table + b * p.table_batch_stride : nullptr,
      .table_stride = p.table_block_stride,
      .block_size = p.slots,
      .blocks = p.blocks,
      .lse_rows = p.rows,
  };
}

// The sequence as a call of attention_decode.
AttentionDecodeParams few_queries(const AttentionVarlenParams& p, int64_t b, const Sequence& s) {
  return {
      .q = moved(p, p.q, s.first_row * p.q_strides.position),
      .k_cache = cache_of(p, p.k, p.k_strides, b, s),
      .v_cache = cache_of(p, p.v, p.v_strides, b, s),
      .k_scale = nullptr,
      .v_scale = nullptr,
      .lengths = &s.keys,
      .block_table = p.block_table ? p.block_table + b * p.table_batch_stride : nullptr,
      .sinks = p.sinks,
      .out = out_of(p, s.first_row),
      .lse = p.lse ? p.lse + s.first_row : nullptr,
      .workspace = p.workspace + s.chunks_at,
      .q_strides = p.q_strides,
      .k_strides = p.k_strides,
      .v_strides = p.v_strides,
      .out_strides = p.out_strides,
      .k_scale_strides = {},
      .v_scale_strides = {},
      .lengths_stride = 1,
      .table_batch_stride = 0,
      .table_block_stride = p.table_block_stride,
      .batch = 1,
      .heads = p.heads,
      .kv_heads = p.kv_heads,
      .queries = s.queries,
      .dim = p.dim,
      .value_dim = p.value_dim,
      .slots = p.block_table ? p.slots : s.keys,
      .blocks = p.blocks,
      .max_blocks = p.block_table ? (s.keys + p.slots - 1) / p.slots : 0,
      .window_left = p.window_left,
      .dtype = p.dtype,
      .sinks_dtype = p.sinks_dtype,
      .lengths_are_64 = true,
      .sm_scale = p.sm_scale,
      .softcap = p.softcap,
      .lse_rows = p.rows,
  };
}

// The table of the sequences; `bytes` grows by what their chunks need.
Sequence sequence_of(const AttentionVarlenParams& p, int64_t b, int64_t start, int64_t& bytes) {
  Sequence s{p.sequence(b), 0, 0, start, -1};
  if (s.queries == 0) return s;
  // (Of one query causality hides nothing.)
  if (s.queries <= kDecodeQueries && (p.causal || s.queries == 1)) {
    s.chunks_at = bytes;
    const AttentionDecodeParams few = few_queries(p, b, s);
    const decoding::Call c{few};
    bytes += to_lines_of_bytes(decoding::workspace_bytes(c));
    const int64_t chunks = c.chunks(s.keys);
    s.tasks = p.kv_heads * (chunks > 0 ? chunks : 1);
    s.cost = c.rows * (s.keys * p.kv_heads / s.tasks + 1) * (p.dim + p.value_dim);
  } else {
    const AttentionParams many = many_queries(p, b, s);
    s.tasks = p.kv_heads * Call{many}.blocks;
    s.cost = products_of_task(many);
  }
  return s;
}

template <class T>
void run_tasks(const AttentionVarlenParams& p, int64_t b, const Sequence& s, int64_t begin, int64_t end) {
  if (s.chunks_at < 0) {
    const AttentionParams many = many_queries(p, b, s);
    return tasks_of<T>(Call{many}, begin, end);
  }
  const AttentionDecodeParams few = few_queries(p, b, s);
  const decoding::Call c{few};
  const int64_t chunks = s.tasks / p.kv_heads;
  for (int64_t i = begin; i < end; ++i) {
    decoding::run_chunk<T, T>(c, i / chunks, i % chunks);
    if (chunks == 1) decoding::finish<T>(c, i, c.chunks(s.keys));
  }
}

// Rows [begin, end), which are in no sequence.
void clear_rows(const AttentionVarlenParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>() {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t h = 0; h < p.heads; ++h) {
        std::memset(static_cast<T*>(p.out) + p.out_strides.offset(0, h, row), 0, p.value_dim * sizeof(T));
        if (p.lse) p.lse[h * p.rows + row] = -kInfinity;
      }
  });
}

}  // namespace

void attention_varlen(const AttentionVarlenParams& p, const Threads& threads) {
  Sequence* const sequences = reinterpret_cast<Sequence*>(p.workspace);
  int64_t products = 0, bytes = to_lines_of_bytes(p.batch * static_cast<int64_t>(sizeof(Sequence)));
  clear_rows(p, 0, p.cu_seqlens_q[0] < p.rows ? p.cu_seqlens_q[0] : p.rows);
  clear_rows(p, p.cu_seqlens_q[p.batch] < 0 ? 0 : p.cu_seqlens_q[p.batch], p.rows);
  bool in_chunks = false;
  for (int64_t b = 0; b < p.batch; ++b) {
    sequences[b] = sequence_of(p, b, products, bytes);
    products += sequences[b].tasks * sequences[b].cost;
    in_chunks |= sequences[b].chunks_at >= 0 && sequences[b].tasks > p.kv_heads;
  }
  threads.parallel_for(products, kProductsPerThread, [&](int64_t begin, int64_t end) {
    int64_t low = 0, high = p.batch;  // the last sequence that starts at or before `begin`
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (sequences[middle].start <= begin ? low : high) = middle;
    }
    for (int64_t b = low; b < p.batch && sequences[b].start < end; ++b) {
      const Sequence& s = sequences[b];
      if (s.tasks == 0) continue;
      const auto tasks_before = [&](int64_t at) {
        const int64_t tasks = (at - s.start + s.cost - 1) / s.cost;
        return at <= s.start ? 0 : tasks > s.tasks ? s.tasks : tasks;
      };
      with_type(p.dtype, [&]<class T>() { run_tasks<T>(p, b, s, tasks_before(begin), tasks_before(end)); });
    }
  });
  if (!in_chunks) return;
  threads.parallel_for(p.batch * p.kv_heads, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence& s = sequences[i / p.kv_heads];
      if (s.chunks_at < 0 || s.tasks <= p.kv_heads) continue;
      const AttentionDecodeParams few = few_queries(p, i / p.kv_heads, s);
      const decoding::Call c{few};
      with_type(p.dtype, [&]<class T>() { decoding::finish<T>(c, i % p.kv_heads, c.chunks(s.keys)); });
    }
  });
}

#ifdef LLMKERN_PORTABLE
int64_t varlen_workspace_bytes(const AttentionVarlenParams& p) {
  int64_t bytes = to_lines_of_bytes(p.batch * static_cast<int64_t>(sizeof(Sequence)));
  for (int64_t b = 0; b < p.batch; ++b) sequence_of(p, b, 0, bytes);
  return bytes;
}
#endif

}  // namespace llmkern::LLMKERN_ISA

#ifdef LLMKERN_PORTABLE
int64_t llmkern::attention_varlen_workspace_bytes(const AttentionVarlenParams& p) {
  return portable::varlen_workspace_bytes(p);
}
#endif

LLMKERN_PRODUCTS_LAUNCHER(attention_varlen, AttentionVarlenParams)
