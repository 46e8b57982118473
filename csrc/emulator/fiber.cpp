#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

// DSNET_UCONTEXT chooses the portable switch, which enters the kernel twice per change.
#if defined(__x86_64__) && !defined(DSNET_UCONTEXT)
#define DSNET_OWN_SWITCH
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace dsnet::emulator {

StackPool::~StackPool() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (std::byte* mapping : mappings_) munmap(mapping, stack_bytes + page);
}

std::byte* StackPool::stack(size_t index) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  while (mappings_.size() <= index) {
    void* mapping = mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapping, page, PROT_NONE);
    mappings_.push_back(static_cast<std::byte*>(mapping));
  }
  return mappings_[index] + page;
}

struct Fiber::Context {
#if defined(DSNET_OWN_SWITCH)
  void* own = nullptr;
  void* caller = nullptr;
#else
  ucontext_t own;
  ucontext_t caller;
#endif
  std::byte* stack = nullptr;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
  // What AddressSanitizer wants to know at every change of stack.
  void* own_fake_stack = nullptr;
  void* caller_fake_stack = nullptr;
  const void* caller_stack = nullptr;
  size_t caller_stack_bytes = 0;
};

#if defined(DSNET_OWN_SWITCH)
// Saves the registers that a call preserves, and exchanges the stack pointers. A new stack holds
// the fiber in r12 and its entry in r13.
extern "C" void dsnet_switch_stack(void** save, void* load);
extern "C" void dsnet_enter_fiber();
asm(R"(
.text
.globl dsnet_switch_stack
.hidden dsnet_switch_stack
.type dsnet_switch_stack, @function
dsnet_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dsnet_switch_stack, .-dsnet_switch_stack

.globl dsnet_enter_fiber
.hidden dsnet_enter_fiber
.type dsnet_enter_fiber, @function
dsnet_enter_fiber:
  .cfi_startproc
  .cfi_undefined rip
  movq %r12, %rdi
  callq *%r13
  ud2
  .cfi_endproc
.size dsnet_enter_fiber, .-dsnet_enter_fiber
)");
#endif

Fiber::Fiber() : context_(std::make_unique<Context>()) {}
Fiber::~Fiber() = default;

void Fiber::start(std::byte* stack, void (*entry)(void*), void* argument) {
  Context& c = *context_;
  c.stack = stack;
  c.entry = entry;
  c.argument = argument;
  c.own_fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  // A kernel that was abandoned after an error leaves its frames poisoned.
  __asan_unpoison_memory_region(stack, StackPool::stack_bytes);
#endif
#if defined(DSNET_OWN_SWITCH)
  void** top = reinterpret_cast<void**>(stack + StackPool::stack_bytes);
  *--top = reinterpret_cast<void*>(&dsnet_enter_fiber);
  *--top = nullptr;                               // rbp
  *--top = nullptr;                               // rbx
  *--top = this;                                  // r12
  *--top = reinterpret_cast<void*>(&Fiber::run);  // r13
  *--top = nullptr;                               // r14
  *--top = nullptr;                               // r15
  c.own = top;
#else
  getcontext(&c.own);
  c.own.uc_stack.ss_sp = stack;
  c.own.uc_stack.ss_size = StackPool::stack_bytes;
  c.own.uc_link = nullptr;
  const uint64_t address = reinterpret_cast<uintptr_t>(this);
  // makecontext passes ints only.
  auto enter = +[](unsigned high, unsigned low) {
    run(reinterpret_cast<Fiber*>(static_cast<uint64_t>(high) << 32 | low));
  };
  makecontext(&c.own, reinterpret_cast<void (*)()>(enter), 2, static_cast<unsigned>(address >> 32),
      static_cast<unsigned>(address));
#endif
}

void Fiber::run(Fiber* fiber) {
  Context& c = *fiber->context_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &c.caller_stack, &c.caller_stack_bytes);
#endif
  c.entry(c.argument);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, c.caller_stack, c.caller_stack_bytes);
#endif
#if defined(DSNET_OWN_SWITCH)
  dsnet_switch_stack(&c.own, c.caller);
#else
  setcontext(&c.caller);
#endif
  __builtin_unreachable();
}

void Fiber::resume() {
  Context& c = *context_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&c.caller_fake_stack, c.stack, StackPool::stack_bytes);
#endif
#if defined(DSNET_OWN_SWITCH)
  dsnet_switch_stack(&c.caller, c.own);
#else
  swapcontext(&c.caller, &c.own);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(c.caller_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
  Context& c = *context_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&c.own_fake_stack, c.caller_stack, c.caller_stack_bytes);
#endif
#if defined(DSNET_OWN_SWITCH)
  dsnet_switch_stack(&c.own, c.caller);
#else
  swapcontext(&c.own, &c.caller);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(c.own_fake_stack, &c.caller_stack, &c.caller_stack_bytes);
#endif
}

}  // namespace dsnet::emulator
