// Tensors as the operations see them: memory with a type, sizes and strides. Nothing here depends on torch; bind.cpp
// converts from and to torch's tensors.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace lorafleet {

// The element types that operations accept, with torch's numbers.
enum class Scalar : int32_t { kByte = 0, kChar = 1, kInt = 3, kLong = 4, kHalf = 5, kFloat = 6, kBool = 11, kBFloat16 = 15 };

// Returns torch's name of a type, also for those that no operation accepts.
std::string_view name_of(Scalar type);

inline void add_text(std::string& text, std::string_view part) { text += part; }
inline void add_text(std::string& text, std::integral auto part) { text += std::to_string(part); }
inline void add_text(std::string& text, Scalar part) { text += name_of(part); }

template <typename... Parts>
[[noreturn]] __attribute__((cold, noinline)) void fail(const Parts&... parts) {
  std::string text;
  (add_text(text, parts), ...);
  throw std::runtime_error(text);
}

// Throws an exception that torch reports as RuntimeError.
#define LORAFLEET_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]] lorafleet::fail(__VA_ARGS__)

constexpr int64_t kMaxDims = 8;

struct Tensor {
  std::shared_ptr<void> memory;  // owns the data
  char* data = nullptr;
  Scalar type = Scalar::kFloat;
  int64_t dims = 0;
  std::array<int64_t, kMaxDims> shape, steps;  // sizes and strides, in elements; the first `dims` entries are used

  int64_t dim() const { return dims; }
  // Negative dimensions count from the last one.
  int64_t size(int64_t d) const { return shape[place(d)]; }
  int64_t stride(int64_t d) const { return steps[place(d)]; }
  std::span<const int64_t> sizes() const { return {shape.data(), static_cast<size_t>(dims)}; }
  bool has_sizes(std::span<const int64_t> wanted) const { return std::ranges::equal(sizes(), wanted); }
  bool has_sizes(std::initializer_list<int64_t> wanted) const {
    return has_sizes(std::span(wanted.begin(), wanted.size()));
  }

  int64_t numel() const {
    int64_t number = 1;
    for (const int64_t size : sizes()) number *= size;
    return number;
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dims - 1; d >= 0; --d) {
      if (shape[d] != 1 && steps[d] != expected && numel() != 0) return false;
      expected *= shape[d];
    }
    return true;
  }

  int64_t element_size() const {
    switch (type) {
      case Scalar::kByte:
      case Scalar::kChar:
      case Scalar::kBool:
        return 1;
      case Scalar::kHalf:
      case Scalar::kBFloat16:
        return 2;
      case Scalar::kLong:
        return 8;
      default:
        return 4;
    }
  }
  int64_t nbytes() const { return numel() * element_size(); }

  // A view of a matrix's columns [first, first + length).
  Tensor columns(int64_t first, int64_t length) const {
    Tensor part = *this;
    part.data += first * element_size();
    part.shape[1] = length;
    return part;
  }

  // A view of entries [first, first + length) of the first dimension.
  Tensor rows(int64_t first, int64_t length) const {
    Tensor part = *this;
    part.data += first * steps[0] * element_size();
    part.shape[0] = length;
    return part;
  }

  // Columns [first, first + heads * width) of a matrix as [rows, heads, width].
  Tensor heads(int64_t first, int64_t heads, int64_t width) const {
    Tensor part = columns(first, width);
    part.dims = 3;
    part.shape = {shape[0], heads, width};
    part.steps = {steps[0], width, 1};
    return part;
  }

 private:
  int64_t place(int64_t d) const {
    const int64_t at = d < 0 ? d + dims : d;
    LORAFLEET_CHECK(0 <= at && at < dims, "dimension ", d, " of a tensor with ", dims);
    return at;
  }
};

using OptionalTensor = std::optional<Tensor>;
using Tensors = std::span<const Tensor>;
using Ints = std::span<const int64_t>;

template <typename T>
constexpr Scalar kScalarOf = Scalar::kFloat;
template <>
inline constexpr Scalar kScalarOf<int32_t> = Scalar::kInt;
template <>
inline constexpr Scalar kScalarOf<int64_t> = Scalar::kLong;
template <>
inline constexpr Scalar kScalarOf<uint8_t> = Scalar::kByte;

// The entries of a contiguous tensor of float, int32, int64 or byte.
template <typename T>
T* entries_of(const Tensor& t, const char* name) {
  LORAFLEET_CHECK(t.type == kScalarOf<T>, name, " is ", t.type, ", not ", kScalarOf<T>);
  LORAFLEET_CHECK(t.is_contiguous(), name, " must be contiguous");
  return reinterpret_cast<T*>(t.data);
}

// Provided by torch: memory for a contiguous tensor, the number of threads, and the product with a weight [N, K] that
// is not packed.
Tensor empty(Ints sizes, Scalar type);
inline Tensor empty(std::initializer_list<int64_t> sizes, Scalar type) {
  return empty(Ints(sizes.begin(), sizes.size()), type);
}
int num_threads();
Tensor plain_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

}  // namespace lorafleet
