// The launchers' own heuristics (llmkern/plan.h), as Python can ask them.
#include "plans.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "llmkern/plan.h"

namespace py = pybind11;

namespace llmkern {
namespace {

using Shape = std::vector<int64_t>;

const Shape& of_length(const Shape& shape, size_t length, const char* names) {
  if (shape.size() != length) throw std::invalid_argument(std::string("plan: shape is ") + names);
  return shape;
}

py::dict launched(const char* kernel, int64_t blocks, int threads, int shared_bytes, const Residency& residency,
                  const Gpu& gpu) {
  py::dict plan;
  plan["kernel"] = kernel, plan["blocks"] = blocks, plan["threads"] = threads, plan["shared_bytes"] = shared_bytes;
  plan["blocks_per_sm"] = resident_blocks(residency, threads, shared_bytes, gpu.sm());
  return plan;
}

py::dict rows(const std::string& kernel, const Shape& shape, int element_bytes, bool aligned, const Gpu& gpu) {
  of_length(shape, 2, "rows, hidden");
  const RowPlan p = plan_rows(shape[0], shape[1], element_bytes, aligned, gpu);
  const Residency residency = kernel == "norm"             ? norm_residency(p.held)
                              : kernel == "activate_codes" ? codes_residency(p.held)
                                                           : quantize_residency(p.held);
  py::dict plan = launched(kernel.c_str(), p.blocks, p.row_threads * p.rows_per_block, kRowSharedBytes, residency, gpu);
  plan["rows_per_block"] = p.rows_per_block, plan["vector"] = p.vector, plan["held"] = p.held;
  return plan;
}

py::dict product(const Shape& shape, int element_bytes, const Gpu& gpu) {
  of_length(shape, 3, "m, n, k");
  const Int8MatmulPlan p = plan_int8_matmul(shape[0], shape[1], shape[2], element_bytes == 2, gpu);
  const bool decode = p.kernel == Int8MatmulKernel::decode_8 || p.kernel == Int8MatmulKernel::decode_16;
  py::dict plan =
      launched(decode ? "int8_decode" : "int8_matmul", p.blocks * p.parts, p.threads, p.shared_bytes, p.residency, gpu);
  plan["tile"] = py::make_tuple(p.block_m, p.block_n), plan["stages"] = p.stages, plan["parts"] = p.parts;
  return plan;
}

py::dict decode(const Shape& shape, int element_bytes, const Gpu& gpu) {
  of_length(shape, 5, "batch, kv_heads, rows, keys, dim");
  const AttentionDecodePlan p =
      plan_attention_decode(shape[0], shape[1], shape[2], shape[3], shape[4], element_bytes, gpu);
  const AttentionDecodeTile& tile = p.tile;
  py::dict plan = launched("attention_decode", p.blocks, tile.threads(), tile.shared_bytes(), tile.residency(), gpu);
  plan["rows"] = tile.rows(), plan["keys"] = tile.keys(), plan["stages"] = tile.stages(), plan["splits"] = p.splits;
  return plan;
}

py::dict attention(const Shape& shape, const Gpu& gpu) {
  of_length(shape, 8, "batch, heads, kv_heads, queries, keys, dim, value_dim, masked");
  const AttentionPlan p =
      plan_attention(shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], shape[7] != 0, gpu);
  const AttentionTile& tile = p.tile;
  py::dict plan = launched("attention", p.blocks, tile.threads(), tile.shared_bytes(), tile.residency(), gpu);
  plan["queries"] = tile.block_m, plan["keys"] = tile.block_n, plan["dim"] = tile.dim, plan["stages"] = tile.stages;
  return plan;
}

constexpr std::pair<GradientPart, const char*> kGradientParts[] = {{GradientPart::row_sums, "attention_row_sums"},
                                                                   {GradientPart::dq, "attention_dq"},
                                                                   {GradientPart::dkv, "attention_dkv"},
                                                                   {GradientPart::dk, "attention_dk"},
                                                                   {GradientPart::dv, "attention_dv"},
                                                                   {GradientPart::dmask, "attention_dmask"}};

constexpr bool has_gradient_part(int dim, GradientPart part) {
  const bool apart = part == GradientPart::dk || part == GradientPart::dv;
  return dim == 256 ? part != GradientPart::dkv : !apart;
}

py::dict gradient(GradientPart part, const char* name, const Shape& shape, const Gpu& gpu) {
  of_length(shape, 6, "batch, heads, kv_heads, queries, keys, head_dim");
  const AttentionBackwardPlan p = plan_attention_backward(shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]);
  if (!has_gradient_part(p.dim, part))
    throw std::invalid_argument("plan: " + std::to_string(shape[5]) + " dimensions need no " + name);
  const bool of_queries = part == GradientPart::row_sums || part == GradientPart::dq;
  const GradientTile tile = gradient_tile(p.dim, part);
  py::dict plan = launched(name, of_queries ? p.query_blocks : p.key_blocks, tile.threads(), tile.shared_bytes,
                           tile.residency(), gpu);
  plan["tile"] = py::make_tuple(tile.own, tile.step), plan["stages"] = 2;
  return plan;
}

py::dict plan(const std::string& kernel, const Shape& shape, int element_bytes, bool aligned, int sm_count,
              int capability) {
  const Gpu gpu{nullptr, sm_count, capability};
  const int vector = aligned ? 16 / element_bytes : 1;
  if (kernel == "norm" || kernel == "quantize_int8" || kernel == "activate_codes")
    return rows(kernel, shape, element_bytes, aligned, gpu);
  if (kernel == "int8_matmul") return product(shape, element_bytes, gpu);
  if (kernel == "activate") {
    of_length(shape, 2, "rows, hidden");
    return launched("activate", elementwise_blocks(shape[0], shape[1], vector), kElementwiseThreads, 0, kElementwise,
                    gpu);
  }
  if (kernel == "rope") {
    of_length(shape, 4, "positions, heads, dim, rotary_dim");
    const RopePlan p = plan_rope(shape[0], shape[1], shape[2], shape[3], vector);
    return launched("rope", p.blocks, p.threads, 0, kRope, gpu);
  }
  if (kernel == "attention") return attention(shape, gpu);
  if (kernel == "attention_decode") return decode(shape, element_bytes, gpu);
  for (const auto& [part, name] : kGradientParts)
    if (kernel == name && part != GradientPart::dmask) return gradient(part, name, shape, gpu);
  throw std::invalid_argument(
      "plan: " + kernel +
      " is none of norm, quantize_int8, activate, activate_codes, rope, int8_matmul, attention, "
      "attention_decode, attention_row_sums, attention_dq, attention_dkv, attention_dk, attention_dv");
}

// function: its name in profilers and cuobjdump, with * for parts that differ between instantiations.
py::dict described(const char* name, const char* function, const char* tile, const Residency& residency,
                   int shared_bytes, int stages, const char* needs) {
  const int blocks = resident_blocks(residency, residency.threads, shared_bytes, sm_of(80));
  py::dict kernel;
  kernel["name"] = name, kernel["function"] = function, kernel["tile"] = tile, kernel["threads"] = residency.threads;
  kernel["registers"] = residency.registers(), kernel["shared_bytes"] = shared_bytes, kernel["stages"] = stages;
  kernel["blocks_per_sm"] = blocks, kernel["occupancy"] = blocks * residency.threads / 2048.0, kernel["needs"] = needs;
  return kernel;
}

py::list kernels() {
  constexpr const char *kAny = "sm_80", *kRow = "a row by a warp or a block";
  py::list table;
  auto add = [&](auto... facts) { table.append(described(facts...)); };
  add("norm", "norm_kernel<*, [14]>", kRow, norm_residency(4), kRowSharedBytes, 1, kAny);
  add("norm", "norm_kernel<*, 8>", kRow, norm_residency(8), kRowSharedBytes, 1, kAny);
  add("norm_backward", "norm_backward_kernel<*, 1>", "a row", kNormBackward, kRowSharedBytes, 1, kAny);
  add("norm_backward", "norm_backward_kernel<*, [24]>", "a row", kNormBackwardLong, kRowSharedBytes, 1, kAny);
  add("sum_blocks", "sum_blocks_kernel", "32 columns", kSumBlocks, kSumBlocksSharedBytes, 1, kAny);
  add("quantize_int8", "quantize_int8_kernel<*, [14]>", kRow, quantize_residency(4), kRowSharedBytes, 1, kAny);
  add("quantize_int8", "quantize_int8_kernel<*, 8>", kRow, quantize_residency(8), kRowSharedBytes, 1, kAny);
  add("activate", "activate_kernel<*>", "1024 vectors of a row", kElementwise, 0, 1, kAny);
  add("activate_backward", "activate_backward_kernel<*>", "1024 vectors of a row", kElementwise, 0, 1, kAny);
  add("activate_codes", "activate_codes_kernel<*, 1, (*>", kRow, codes_residency(1), kRowSharedBytes, 1, kAny);
  add("activate_codes", "activate_codes_kernel<*, [48], (*>", kRow, codes_residency(8), kRowSharedBytes, 1, kAny);
  add("rope", "rope_kernel<*>", "the heads of a position", kRope, 0, 1, kAny);
  for (const bool halves : {false, true})
    for (const Int8MatmulKernel kernel : kProductTiles) {
      if (!has_product_tile(kernel, halves)) continue;
      const ProductTile tile = product_tile(kernel, halves);
      const std::string function = std::string("int8_matmul_kernel<") + (halves ? "*16" : "signed char") +
                                   ", (llmkern::Int8MatmulKernel)" + std::to_string(static_cast<int>(kernel)) + ", *>";
      const std::string text = std::to_string(tile.block_m) + "x" + std::to_string(tile.block_n);
      add(halves ? "int8_matmul_halves" : "int8_matmul", function.c_str(), text.c_str(), tile.residency(),
          tile.shared_bytes(), tile.stages, kAny);
    }
  const Gpu gpu{nullptr, 1, 80};
  const Int8MatmulPlan few = plan_int8_matmul(8, 1, 1, false, gpu), more = plan_int8_matmul(16, 1, 1, false, gpu);
  add("int8_decode", "int8_decode_kernel<*, 1, *>", "8x16", few.residency, few.shared_bytes, 1, kAny);
  add("int8_decode", "int8_decode_kernel<*, 2, *>", "16x16", more.residency, more.shared_bytes, 1, kAny);
  add("sum_parts", "sum_parts_kernel<*>", "1024 elements", kSumParts, 0, 1, kAny);
  for (const int element_bytes : {2, 1})
    for (const int dim : {64, 128, 256})
      for (const bool one_team : {false, true}) {
        const AttentionDecodeTile tile{dim, element_bytes, one_team};
        const std::string function = std::string("attention_decode_kernel<*") + (element_bytes == 1 ? "char" : "16") +
                                     ", " + std::to_string(dim) + (one_team ? ", true>" : ", false>");
        const std::string shape = std::to_string(tile.rows()) + "x" + std::to_string(tile.keys());
        add("attention_decode", function.c_str(), shape.c_str(), tile.residency(), tile.shared_bytes(), tile.stages(),
            kAny);
      }
  add("attention_decode_combine", "combine_kernel<*>", "a query of a head", kCombine, kCombineSharedBytes, 1, kAny);
  for (const int dim : {64, 128, 256})
    for (const auto& [large, compact] : {std::pair{true, false}, {false, false}, {true, true}, {false, true}}) {
      if ((dim == 256 && !large) || (dim != 128 && compact)) continue;  // the same as another
      const AttentionTile tile = attention_tile(dim, large, compact);
      const std::string function = "attention_kernel<*, " + std::to_string(dim) + (large ? ", true" : ", false") +
                                   (compact ? ", true>" : ", false>");
      const std::string text =
          std::to_string(tile.block_m) + "x" + std::to_string(tile.block_n) + "x" + std::to_string(dim);
      add("attention", function.c_str(), text.c_str(), tile.residency(), tile.shared_bytes(), tile.stages, kAny);
    }
  for (const int dim : {64, 128, 256})
    for (const auto& [part, name] : kGradientParts) {
      if (!has_gradient_part(dim, part)) continue;
      const GradientTile tile = gradient_tile(dim, part);
      const std::string arguments = "<*, " + std::to_string(dim), number = std::to_string(static_cast<int>(part));
      const std::string function = part == GradientPart::dmask ? "attention_dmask_kernel" + arguments + ">"
                                                               : "attention_gradient_kernel" + arguments +
                                                                     ", (llmkern::GradientPart)" + number + ">";
      const std::string text = std::to_string(tile.own) + "x" + std::to_string(tile.step) + "x" + std::to_string(dim);
      const int stages = part == GradientPart::dmask ? 1 : 2;
      add(name, function.c_str(), text.c_str(), tile.residency(), tile.shared_bytes, stages, kAny);
    }
  add("attention_prepare", "attention_prepare_kernel<*>", "8 queries", kGradientRows, 0, 1, kAny);
  add("attention_sink", "attention_sink_kernel", "a head", kGradientRows, kRowSharedBytes, 1, kAny);
  return table;
}

}  // namespace

void define_plans(py::module_& m) {
  m.def("plan", &plan, py::arg("kernel"), py::arg("shape"), py::arg("element_bytes") = 2, py::arg("aligned") = true,
        py::arg("sm_count") = 132, py::arg("capability") = 90,
        "What the launcher of a CUDA kernel would launch: the kernel, blocks, threads, shared memory, and how many of\n"
        "the blocks fit onto an SM.\n\n"
        "shape: rows, hidden of norm, quantize_int8, activate and activate_codes; positions, heads, dim, rotary_dim of "
        "rope; m, n, k of int8_matmul; batch, heads, kv_heads, queries, keys, dim, value_dim, masked (by attn_mask: 1, "
        "else 0) of attention; batch, kv_heads, rows (packed queries of a key head), keys, dim of attention_decode; "
        "batch, heads, kv_heads, queries, keys, head_dim of attention_dq and the other parts of attention's backward.\n"
        "element_bytes: of an element; of int8_matmul 1 for codes, 2 weight-only.  aligned: rows begin at multiples of "
        "16 bytes.  sm_count: the GPU's SMs.  "
        "capability: 10 * major + minor.");
  m.def(
      "kernels", &kernels,
      "The CUDA kernels: tile, most threads, shared memory, stages and what they need; the registers that a thread may "
      "have at most, and what these and shared memory allow on an SM of compute capability 8.0: blocks_per_sm of so "
      "many threads, and as occupancy their share of its 64 warps.");
}

}  // namespace llmkern
