// layers: layers of a model one after the other, each a program (llmkern/programs/program.py) over the launchers of its
// steps, in one piece of scratch memory.
//   check    everything that would be read, of every layer, before the first one writes anything
//   plan     which values lie where, for as long as they are read; who makes int8 codes; sums that a norm makes itself
//   run      the launchers, in the program's order
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>

#include "llmkern/dtype.h"
#include "llmkern/packed.h"
#include "llmkern/threads.h"

namespace llmkern::layers {

enum class Element : int8_t { f32, bf16, f16, s8, u8, boolean, other };  // the first three as in DType

constexpr int64_t size_of(Element type) {
  return type == Element::f32 ? 4 : type == Element::bf16 || type == Element::f16 ? 2 : 1;
}

// A tensor of a call.
struct Array {
  static constexpr int kMostDims = 4;

  void* data = nullptr;
  int dims = -1;  // -1: no tensor was given.  Of more than kMostDims only the first sizes are kept
  Element type = Element::other;
  bool on_cpu = true;
  int64_t size[kMostDims] = {}, stride[kMostDims] = {};  // strides in elements
  // A packed weight [size[0], size[1]]; the tensor stands for it, and nothing else of it counts.
  const PackedWeight* packed = nullptr;

  explicit operator bool() const { return dims >= 0; }
  bool is_floating() const { return type <= Element::f16; }
  DType dtype() const { return static_cast<DType>(type); }  // of a floating array
  bool has_contiguous_rows() const { return size[dims - 1] <= 1 || stride[dims - 1] == 1; }

  // Return true if both are given and differ in their memory only, or neither is given.
  bool is_like(const Array& other) const {
    return dims == other.dims && type == other.type && on_cpu == other.on_cpu && is_packed_like(other) &&
           std::equal(size, size + kMostDims, other.size) && std::equal(stride, stride + kMostDims, other.stride);
  }

  bool is_packed_like(const Array& other) const {
    if (!packed || !other.packed) return packed == other.packed;
    const auto alike = [](const PackedGroups& a, const PackedGroups& b) {
      return !a.data == !b.data && a.size == b.size && a.type == b.type;
    };
    const PackedWeight &a = *packed, &b = *other.packed;
    return a.code == b.code && alike(a.scale, b.scale) && alike(a.zero, b.zero) && alike(a.offset, b.offset) &&
           alike(a.super_scale, b.super_scale) && alike(a.super_offset, b.super_offset);
  }

  // A vector of n elements in one piece, whatever its dimensions of size 1 are.
  bool is_vector(int64_t n) const {
    if (dims < 1 || dims > kMostDims) return false;
    for (int d = 0; d < dims; ++d) {
      if (size[d] == 1) continue;
      if (size[d] != n || (n > 1 && stride[d] != 1)) return false;
      for (int e = d + 1; e < dims; ++e)
        if (size[e] != 1) return false;
      return true;
    }
    return n == 1;
  }

  std::string shape() const {
    std::string text = "[";
    for (int d = 0; d < dims && d < kMostDims; ++d) text += (d ? ", " : "") + std::to_string(size[d]);
    return text + (dims > kMostDims ? ", …]" : "]");
  }
};

// A call that is wrong; the message is the sentence for its caller.
struct Invalid : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A call that is right, but has what the kernels do not take; the message says what.
struct NotServed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A program, parsed.
struct Program;

// The program that a text says, kept by its text.  Throws Invalid with the line that is wrong.
std::shared_ptr<const Program> parsed(const std::string& text);

// The tensors that it takes of a layer: of a linear layer weight, scale and bias, of a norm weight and bias.
size_t tensors_of(const Program& program);

// Return true if keys and values are appended to a cache, and if those of other tokens are kept in one.
bool appends(const Program& program);
bool keeps(const Program& program);

// Arrays of one layer: keys, values, and for int8 codes their scales; then the keys and values that are kept.
inline constexpr size_t kCaches = 6, kKeptCache = 4;

// A product that another library makes: x [rows, k], rows x_stride elements apart, times weight [n, k], rows w_stride
// and columns w_column_stride apart, plus bias [n] or null; all in dtype.
struct Product {
  const void *x, *weight, *bias;
  int64_t rows, n, k, x_stride, w_stride, w_column_stride;
  DType dtype;
};

// The interface of that library.  Results are [rows, n], contiguous, and stay until `release`.
struct Library {
  void* (*multiply)(void* context, const Product& product);
  void (*release)(void* context);
  void* context;
};

struct Call {
  Array hidden;                                              // [batch, length, columns], contiguous
  void* out;                                                 // the same shape and type, contiguous; not hidden
  std::span<const std::shared_ptr<const Program>> programs;  // of each layer, at least one
  std::span<const Array> parameters;                         // of each layer, in its program's order
  std::span<const Array> inputs;                             // of the programs, behind hidden
  std::span<const Array> caches;                             // none, or kCaches of each layer
  int64_t past;                                              // tokens in the caches
  std::string schemes;  // "w8a8" or "w8a16": of all int8 weights; of each linear layer, with commas; of each layer's,
                        // with semicolons
  Library library;
};

// Whose threads, and how many; torch's are called once for all layers where the launchers make every product.
struct Pool {
  const Threads& threads;
  int64_t count;
};

// Throws Invalid or NotServed, and has then written nothing.
void run(const Call& call, const Pool& pool);

}  // namespace llmkern::layers
