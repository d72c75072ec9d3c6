// A stack of its own, on which code runs until it pauses, and later goes on.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

class Fiber {
 public:
  // Nothing of it runs yet. What `body` leaves behind when it returns, it finds when it is called
  // anew at the next resume().
  explicit Fiber(void (*body)()) : body_(body) {
    void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuardBytes, PROT_NONE);
    stack_ = static_cast<char*>(memory);
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_ + kGuardBytes;
    context_.uc_stack.ss_size = kStackBytes - kGuardBytes;
    makecontext(&context_, enter, 0);
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() { munmap(stack_, kStackBytes); }

  // The one that runs, or null.
  static Fiber* current() { return current_; }

  // Runs it until it pauses. Not to be called on a fiber.
  void resume() {
    current_ = this;
    void* fake_stack = nullptr;
    leave(&fake_stack, context_.uc_stack.ss_sp, context_.uc_stack.ss_size);
    swapcontext(&caller_, &context_);
    arrive(fake_stack, nullptr, nullptr);
    current_ = nullptr;
  }

  // Goes back to where it was resumed. To be called on it.
  void pause() {
    void* fake_stack = nullptr;
    leave(&fake_stack, caller_stack_, caller_bytes_);
    swapcontext(&context_, &caller_);
    arrive(fake_stack, &caller_stack_, &caller_bytes_);
  }

 private:
  static constexpr size_t kGuardBytes = 4096;
  static constexpr size_t kStackBytes = 256 * 1024;  // for a table of 32 KB, unoptimised

  static void enter() {
    Fiber& self = *current_;
    arrive(nullptr, &self.caller_stack_, &self.caller_bytes_);
    while (true) {
      self.body_();
      self.pause();
    }
  }

  // What AddressSanitizer has to know of a switch between stacks.
#if defined(__SANITIZE_ADDRESS__)
  static void leave(void** fake_stack, const void* to, size_t bytes) {
    __sanitizer_start_switch_fiber(fake_stack, to, bytes);
  }
  static void arrive(void* fake_stack, const void** from, size_t* bytes) {
    __sanitizer_finish_switch_fiber(fake_stack, from, bytes);
  }
#else
  static void leave(void**, const void*, size_t) {}
  static void arrive(void*, const void**, size_t*) {}
#endif

  inline static Fiber* current_ = nullptr;

  void (*const body_)();
  char* stack_;
  ucontext_t context_ = {}, caller_ = {};
  const void* caller_stack_ = nullptr;
  size_t caller_bytes_ = 0;
};

}  // namespace emulator
