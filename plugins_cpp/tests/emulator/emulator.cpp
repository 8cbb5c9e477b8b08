// glibc checks fortified jumps for going up one stack; ours change stacks.
#undef _FORTIFY_SOURCE

#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)  // GCC's way to say it; Clang's is a feature
#define REROUTE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define REROUTE_ASAN 1
#endif
#endif
#if defined(REROUTE_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;
constexpr std::size_t kSharedBytes = 48 << 10;  // what every GPU gives without asking: more is an error here too
constexpr unsigned char kGarbage = 0xA5;        // shared memory starts as this, not as zeros

// A fiber outlives its block: it waits in enter() for the next one, because making a context costs a system call.
struct Fiber {
    ucontext_t context{};
    jmp_buf point;
    std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
    void* fake_stack = nullptr;
    dim3 index;
    bool started = false;
    bool done = false;
};

// Everyone waits until `size` have arrived.
struct Barrier {
    unsigned arrived = 0;
    unsigned generation = 0;
};

struct Warp {
    Barrier barrier;
    std::uint32_t values[32];
};

Order order = Order::kAscending;
std::deque<Fiber> fibers;  // addresses must not change
std::vector<Warp> warps;
Barrier block;
std::size_t current;
unsigned threads;
bool progress;
const std::function<void()>* body;
alignas(16) unsigned char shared_memory[kSharedBytes];

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "emulator: %s (block %u,%u,%u thread %u,%u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
                 threadIdx.x, threadIdx.y);
    std::abort();
}

#if defined(REROUTE_ASAN)

// AddressSanitizer must be told of every change of stacks, and does not know longjmp between them.
const void* scheduler_stack;
std::size_t scheduler_stack_bytes;
void* scheduler_fake_stack;
ucontext_t scheduler;

void to_scheduler() {
    Fiber& self = fibers[current];
    __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_stack, scheduler_stack_bytes);
    swapcontext(&self.context, &scheduler);
    __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void to_fiber(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStackBytes);
    swapcontext(&scheduler, &fiber.context);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void arrived_first() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes); }

#else

// swapcontext saves the signal mask, a system call; a jump does not. Only the first entry needs the context.
jmp_buf scheduler_point;

void to_scheduler() {
    if (_setjmp(fibers[current].point) == 0) _longjmp(scheduler_point, 1);
}

void to_fiber(Fiber& fiber) {
    if (_setjmp(scheduler_point) != 0) return;
    if (fiber.started) _longjmp(fiber.point, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

void arrived_first() {}

#endif

void enter() {
    arrived_first();
    for (;;) {
        (*body)();
        fibers[current].done = true;
        progress = true;
        to_scheduler();
    }
}

void add_fiber() {
    Fiber& fiber = fibers.emplace_back();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
}

void resume(std::size_t thread) {
    current = thread;
    threadIdx = fibers[thread].index;
    to_fiber(fibers[thread]);
}

void wait(Barrier& barrier, unsigned size) {
    const unsigned generation = barrier.generation;
    progress = true;
    if (++barrier.arrived == size) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) to_scheduler();
}

void run_block() {
    for (std::size_t i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        const auto flat = static_cast<unsigned>(i);
        fiber.index = dim3(flat % blockDim.x, flat / blockDim.x % blockDim.y, flat / blockDim.x / blockDim.y);
        fiber.done = false;
    }
    for (std::size_t left = threads; left > 0;) {
        progress = false;
        left = 0;
        for (std::size_t i = 0; i < threads; ++i) {
            const std::size_t thread = order == Order::kAscending ? i : threads - 1 - i;
            if (!fibers[thread].done) resume(thread);
            left += fibers[thread].done ? 0 : 1;
        }
        if (left > 0 && !progress) fail("threads wait for others that will not come");
    }
    if (block.arrived != 0) fail("a thread ended while others wait at a barrier");
}

}  // namespace

void set_order(Order new_order) { order = new_order; }

void* dynamic_shared_memory() { return shared_memory; }

void block_barrier() { wait(block, threads); }

std::uint32_t exchange(std::uint32_t value, unsigned source) {
    Warp& warp = warps[current / 32];
    if (threads % 32 != 0) fail("a shuffle in a block that is not whole warps");
    warp.values[current % 32] = value;
    wait(warp.barrier, 32);
    const std::uint32_t got = warp.values[source];
    wait(warp.barrier, 32);
    return got;
}

void run(dim3 grid, dim3 block_shape, std::size_t shared_bytes, const std::function<void()>& kernel) {
    gridDim = grid;
    blockDim = block_shape;
    threads = block_shape.x * block_shape.y * block_shape.z;
    if (shared_bytes > kSharedBytes) fail("more than 48 KiB of dynamic shared memory");
    if (threads > 1024 || grid.y > 65535 || grid.z > 65535) fail("a launch that no GPU takes");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0) fail("an empty launch");
    while (fibers.size() < threads) add_fiber();
    warps.assign((threads + 31) / 32, Warp{});
    block = Barrier{};
    body = &kernel;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                std::memset(shared_memory, kGarbage, sizeof shared_memory);
                run_block();
            }
        }
    }
}

}  // namespace emulator
