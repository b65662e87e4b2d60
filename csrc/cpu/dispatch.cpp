// Chooses the row functions for the processor at hand.

#include "rows.h"

namespace unite {

#if defined(__x86_64__)
namespace x86_v4 {
extern const Kernels table;
}
namespace x86_v3 {
extern const Kernels table;
}
#endif
namespace baseline {
extern const Kernels table;
}

namespace {

struct Choice {
  const Kernels* table;
  const char* name;
};

Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) return {&x86_v4::table, "AVX-512"};
  if (v3) return {&x86_v3::table, "AVX2"};
#endif
  return {&baseline::table, "baseline"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *choice().table; }

const char* instruction_set() { return choice().name; }

}  // namespace unite
