#pragma once

#include <dlfcn.h>

// Loads GCC's OpenMP runtime as a process does that computes with it. False where there is none, and under the thread
// sanitizer, which does not see how its threads meet.
inline bool load_openmp_runtime() {
#if defined(__SANITIZE_THREAD__)
  return false;
#else
  return ::dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL) != nullptr;
#endif
}
