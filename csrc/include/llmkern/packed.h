// A packed weight [n, k], as llmkern/packed.py lays it out: panels of 16 rows, blocks of 32 columns,
//   w = scale · super_scale · (level(code) − zero) + offset · super_offset
#pragma once

#include <cstdint>

namespace llmkern {

inline constexpr int kPanelRows = 16, kPackedBlock = 32;

// s8: two's complement; s4, s5, s6: less 8, 16 and 32; u4, u5: as they are; nl4: levels of a table.
enum class PackedCode : int8_t { s8, s4, u4, nl4, s5, u5, s6 };

constexpr int bits_of(PackedCode code) {
  return code == PackedCode::s8                             ? 8
         : code == PackedCode::s6                           ? 6
         : code == PackedCode::s5 || code == PackedCode::u5 ? 5
                                                            : 4;
}

enum class GroupType : int8_t { f32, bf16, f16, s8, u8 };

// One value for each row and `size` columns: [panels, k / size, 16].  Null data: factors of 1, or addends of 0.
struct PackedGroups {
  const void* data = nullptr;
  int64_t size = kPackedBlock;  // a multiple of 32; or 16, of s6
  GroupType type = GroupType::f32;
};

struct PackedWeight {
  const uint8_t* codes = nullptr;  // [panels, k / 32, 64 · bits]
  PackedGroups scale, zero, offset, super_scale, super_offset;
  PackedCode code = PackedCode::s8;
};

}  // namespace llmkern
