// A packed weight as ops' tensors (llmkern/packed.py), and as launchers take it.
#pragma once

#include "../common.h"
#include "llmkern/packed.h"

namespace llmkern {
namespace {  // as in device.h

inline std::optional<PackedCode> packed_code_of(const std::string& name) {
  constexpr const char* kNames[] = {"s8", "s4", "u4", "nl4", "s5", "u5", "s6"};
  for (int i = 0; i < 7; ++i)
    if (name == kNames[i]) return static_cast<PackedCode>(i);
  return std::nullopt;
}

inline std::optional<GroupType> group_type_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Char) return GroupType::s8;
  if (t.scalar_type() == ScalarType::Byte) return GroupType::u8;
  if (const auto dtype = dtype_of(t)) return static_cast<GroupType>(*dtype);
  return std::nullopt;
}

struct PackedTensors {
  const Tensor &codes, &scale;
  const std::optional<Tensor>&zero, &offset, &super_scale, &super_offset;
  const std::string& code;
  int64_t n;

  int64_t k() const { return codes.size(1) * kPackedBlock; }
};

// Do the kernels have these types?
inline bool kernels_take(const PackedTensors& w) {
  const auto taken = [](const std::optional<Tensor>& t) { return !t || group_type_of(*t).has_value(); };
  return packed_code_of(w.code) && w.codes.scalar_type() == ScalarType::Byte && group_type_of(w.scale) &&
         taken(w.zero) && taken(w.offset) && taken(w.super_scale) && taken(w.super_offset);
}

inline PackedGroups packed_groups(const char* op, const char* name, const std::optional<Tensor>& t,
                                  const PackedTensors& w, PackedCode code) {
  if (!t) return {};
  const int64_t panels = w.codes.size(0), k = w.k();
  STD_TORCH_CHECK(
      t->dim() == 3 && t->size(0) == panels && t->size(2) == kPanelRows && t->is_contiguous() && t->is_cpu(), op, ": ",
      name, " must be contiguous with shape [", panels, ", groups, ", kPanelRows, "], on the CPU");
  const int64_t groups = t->size(1), size = groups ? k / groups : kPackedBlock;
  const bool whole = groups ? size > 0 && size * groups == k : k == 0;
  STD_TORCH_CHECK(whole && (size % kPackedBlock == 0 || (size == 16 && code == PackedCode::s6)), op, ": ", name,
                  " has ", groups, " groups, which do not divide K = ", k, " into whole blocks");
  return {t->const_data_ptr(), size, *group_type_of(*t)};
}

// Checks all that would be read.
inline PackedWeight packed_weight(const char* op, const PackedTensors& w) {
  const PackedCode code = *packed_code_of(w.code);
  STD_TORCH_CHECK(
      w.codes.dim() == 3 && w.codes.size(2) == bits_of(code) * 64 && w.codes.is_contiguous() && w.codes.is_cpu(), op,
      ": codes must be contiguous with shape [panels, K / ", kPackedBlock, ", ", bits_of(code) * 64, "], on the CPU");
  STD_TORCH_CHECK(w.n >= 0 && (w.n + kPanelRows - 1) / kPanelRows == w.codes.size(0), op, ": n is ", w.n, " with ",
                  w.codes.size(0), " panels");
  return {
      .codes = static_cast<const uint8_t*>(w.codes.const_data_ptr()),
      .scale = packed_groups(op, "scale", w.scale, w, code),
      .zero = packed_groups(op, "zero", w.zero, w, code),
      .offset = packed_groups(op, "offset", w.offset, w, code),
      .super_scale = packed_groups(op, "super_scale", w.super_scale, w, code),
      .super_offset = packed_groups(op, "super_offset", w.super_offset, w, code),
      .code = code,
  };
}

}  // namespace
}  // namespace llmkern
