// What the threads of a CPU kernel have: memory that stays theirs, and their tasks.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "reroute/pool.h"

namespace reroute::cpu {

constexpr std::size_t kAlignment = 64;
constexpr std::int64_t kAlone = 1 << 17;  // products that are not worth a second thread

// Whether the fast forms run: the processor has the instructions, and no test wants the portable ones.
bool fast() noexcept;

// Memory of a thread that is kept for its next call.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    template <typename T>
    T* take(std::int64_t count) {
        const auto bytes = (static_cast<std::size_t>(count) * sizeof(T) + kAlignment) / kAlignment * kAlignment;
        if (bytes > bytes_) {
            std::free(data_);
            bytes_ = 0;
            data_ = std::aligned_alloc(kAlignment, bytes);
            if (data_ == nullptr) throw std::bad_alloc();
            bytes_ = bytes;
        }
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
};

// A call of a lambda as a task of a pool; the first exception is that memory ran out, and it is told afterwards.
template <typename Task>
bool run(const Pool& pool, std::int64_t count, const Task& task) {
    struct Call {
        const Task& task;
        std::atomic<bool> failed{false};
    } call{task};
    const auto one = [](void* data, std::size_t index) {
        auto& self = *static_cast<Call*>(data);
        try {
            self.task(static_cast<std::int64_t>(index));
        } catch (const std::bad_alloc&) {
            self.failed = true;
        }
    };
    if (count == 1) {
        one(&call, 0);
    } else {
        pool.run(pool.context, static_cast<std::size_t>(count), one, &call);
    }
    return !call.failed;
}

}  // namespace reroute::cpu
