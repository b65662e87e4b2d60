// Gathers rows of several uint8 arrays (memory-mapped files) into one batch: one copy per row, rows over threads.
// The threads are our own: torch's pool belongs to the training step, and a thread that waits for the disk must not
// hold it up.

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <thread>

#include "ops.h"

namespace unite {
namespace {

struct Copy {
  const uint8_t* source;
  uint8_t* target;
};

// Tells the kernel what the pages of this memory are for; returns at once, and failure does not matter.
void advise(const uint8_t* memory, size_t bytes, int advice) {
  static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) & ~(page - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(memory) + bytes;
  madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

void copy_rows(const Copy* begin, const Copy* end, size_t bytes) {
  for (const Copy* copy = begin; copy < end; ++copy) advise(copy->source, bytes, MADV_WILLNEED);
  for (const Copy* copy = begin; copy < end; ++copy) std::memcpy(copy->target, copy->source, bytes);
}

void check_bytes_tensor(const char* op, const char* name, const Tensor& tensor) {
  check_cpu(op, name, tensor);
  UNITE_CHECK(tensor.scalar_type() == ScalarType::Byte, op, ": ", name, " must be uint8");
  UNITE_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  UNITE_CHECK(tensor.dim() >= 1, op, ": ", name, " has no dimension");
}

const int64_t* integers(const char* op, const char* name, const Tensor& tensor, int64_t count) {
  check_cpu(op, name, tensor);
  UNITE_CHECK(tensor.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64");
  UNITE_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  check_shape(op, name, tensor, {count});
  return static_cast<const int64_t*>(tensor.data_ptr());
}

int64_t row_bytes(const Tensor& tensor) {
  int64_t bytes = 1;
  for (int64_t i = 1; i < tensor.dim(); ++i) bytes *= tensor.size(i);
  return bytes;
}

}  // namespace

void gather_rows(std::vector<Tensor> parts, Tensor part, Tensor row, Tensor out, int64_t threads) {
  const char* op = "gather_rows";
  check_bytes_tensor(op, "out", out);
  UNITE_CHECK(threads >= 1, op, ": threads must be positive, not ", threads);
  const int64_t count = out.size(0), bytes = row_bytes(out);
  const int64_t *which = integers(op, "part", part, count), *index = integers(op, "row", row, count);
  std::vector<Copy> copies(static_cast<size_t>(count));
  uint8_t* target = static_cast<uint8_t*>(out.data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    UNITE_CHECK(which[i] >= 0 && which[i] < int64_t(parts.size()), op, ": part ", which[i], " of ", parts.size());
    const Tensor& source = parts[static_cast<size_t>(which[i])];
    check_bytes_tensor(op, "parts", source);
    UNITE_CHECK(row_bytes(source) == bytes, op, ": rows of parts have ", row_bytes(source), " bytes, of out ", bytes);
    UNITE_CHECK(index[i] >= 0 && index[i] < source.size(0), op, ": row ", index[i], " of ", source.size(0));
    copies[static_cast<size_t>(i)] = {static_cast<const uint8_t*>(source.data_ptr()) + index[i] * bytes,
                                      target + i * bytes};
  }
  // Fresh memory of a large batch comes in huge pages: fewer faults than one per 4 KiB. Pinned memory has its pages.
  if (count * bytes >= (1 << 22)) advise(target, size_t(count * bytes), MADV_HUGEPAGE);
  const int64_t workers = std::min(threads, count);
  const auto work = [&](int64_t worker) {
    copy_rows(copies.data() + count * worker / workers, copies.data() + count * (worker + 1) / workers, size_t(bytes));
  };
  std::vector<std::thread> started;
  for (int64_t worker = 1; worker < workers; ++worker) started.emplace_back(work, worker);
  if (workers > 0) work(0);
  for (std::thread& thread : started) thread.join();
}

}  // namespace unite
