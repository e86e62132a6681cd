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

py::dict launched(const char* kernel, int64_t blocks, int threads, int shared_bytes) {
  py::dict plan;
  plan["kernel"] = kernel, plan["blocks"] = blocks, plan["threads"] = threads, plan["shared_bytes"] = shared_bytes;
  return plan;
}

py::dict rows(const char* kernel, const Shape& shape, int element_bytes, bool aligned, int sm_count) {
  of_length(shape, 2, "rows, hidden");
  const RowPlan p = plan_rows(shape[0], shape[1], element_bytes, aligned, sm_count);
  py::dict plan = launched(kernel, p.blocks, p.row_threads * p.rows_per_block, kRowSharedBytes);
  plan["rows_per_block"] = p.rows_per_block, plan["vector"] = p.vector, plan["held"] = p.held;
  return plan;
}

py::dict product(const Shape& shape, int sm_count) {
  of_length(shape, 3, "m, n, k");
  const Int8MatmulPlan p = plan_int8_matmul(shape[0], shape[1], sm_count);
  const bool decode = p.kernel == Int8MatmulKernel::decode_8 || p.kernel == Int8MatmulKernel::decode_16;
  py::dict plan = launched(decode ? "int8_decode" : "int8_matmul", p.blocks, p.threads, p.shared_bytes);
  plan["tile"] = py::make_tuple(p.block_m, p.block_n), plan["stages"] = p.stages;
  return plan;
}

py::dict plan(const std::string& kernel, const Shape& shape, int element_bytes, bool aligned, int sm_count) {
  const int vector = aligned ? 16 / element_bytes : 1;
  if (kernel == "norm" || kernel == "quantize_int8")
    return rows(kernel.c_str(), shape, element_bytes, aligned, sm_count);
  if (kernel == "int8_matmul") return product(shape, sm_count);
  if (kernel == "activate") {
    of_length(shape, 2, "rows, hidden");
    return launched("activate", elementwise_blocks(shape[0], shape[1], vector), kElementwiseThreads, 0);
  }
  if (kernel == "rope") {
    of_length(shape, 4, "positions, heads, dim, rotary_dim");
    const RopePlan p = plan_rope(shape[0], shape[1], shape[2], shape[3], vector);
    return launched("rope", p.blocks, p.threads, 0);
  }
  throw std::invalid_argument("plan: " + kernel + " is none of norm, quantize_int8, activate, rope, int8_matmul");
}

py::dict described(const char* name, const char* tile, int threads, int shared_bytes, int stages, const char* needs) {
  py::dict kernel;
  kernel["name"] = name, kernel["tile"] = tile, kernel["threads"] = threads, kernel["shared_bytes"] = shared_bytes;
  kernel["stages"] = stages, kernel["needs"] = needs;
  return kernel;
}

py::list kernels() {
  constexpr const char *kAny = "sm_80", *kRow = "a row by a warp or a block";
  py::list table;
  for (const char* name : {"norm", "quantize_int8"})
    table.append(described(name, kRow, kMaxRowThreads, kRowSharedBytes, 1, kAny));
  table.append(described("activate", "1024 vectors of a row", kElementwiseThreads, 0, 1, kAny));
  table.append(described("rope", "the heads of a position", kMaxRopeThreads, 0, 1, kAny));
  for (const auto& [text, tile] : {std::pair{"128x128", kLargeTile}, std::pair{"64x64", kSmallTile}})
    table.append(described("int8_matmul", text, tile.threads(), tile.shared_bytes(), tile.stages, kAny));
  for (const int64_t rows : {8, 16}) {
    const Int8MatmulPlan p = plan_int8_matmul(rows, 1, 1);
    table.append(described("int8_decode", rows == 8 ? "8x16" : "16x16", p.threads, p.shared_bytes, 1, kAny));
  }
  return table;
}

}  // namespace

void define_plans(py::module_& m) {
  m.def(
      "plan", &plan, py::arg("kernel"), py::arg("shape"), py::arg("element_bytes") = 2, py::arg("aligned") = true,
      py::arg("sm_count") = 132,
      "What the launcher of a CUDA kernel would launch: the kernel, blocks, threads and shared memory.\n\n"
      "shape: rows, hidden of norm, quantize_int8 and activate; positions, heads, dim, rotary_dim of rope; m, n, k of "
      "int8_matmul.\nelement_bytes: of an element.  aligned: rows begin at multiples of 16 bytes.");
  m.def("kernels", &kernels, "The CUDA kernels: tile, most threads, shared memory, stages and what they need.");
}

}  // namespace llmkern
