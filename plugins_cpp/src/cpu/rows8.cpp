// Products of int8 rows: checks, and which thread does what.
#include "reroute/rows8.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "rows8_kernels.h"

namespace reroute {
namespace {

using rows8::Kernels;
using rows8::Rows;

constexpr std::int64_t kPart = 48;        // rows of a part at most: what an MLP holds of them fits a core's cache
constexpr std::int64_t kFewest = 8;       // rows of a part at least, before columns are divided too
constexpr std::int64_t kAlone = 1 << 17;  // products that are not worth a second thread
constexpr std::size_t kAlignment = 64;

std::atomic<bool> use_portable{false};

const Kernels& kernels() noexcept {
    static const Kernels* const fast = rows8::avx512_vnni();
    return fast != nullptr && !use_portable.load(std::memory_order_relaxed) ? *fast : rows8::kPortable;
}

// Memory of a thread that is kept for its next call.
class Scratch {
  public:
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

// Quantised rows of a thread.
class QuantizedRows {
  public:
    const Rows& make(const Kernels& form, std::int64_t count, const float* x, std::int64_t pitch, std::int64_t width) {
        const std::int64_t stride = (width + 63) / 64 * 64;
        rows_ = Rows{count,
                     stride,
                     values_.take<std::int8_t>(count * stride),
                     steps_.take<float>(count),
                     sums_.take<std::int32_t>(count * stride / 64),
                     totals_.take<std::int32_t>(count)};
        form.quantize(x, pitch, width, rows_);
        return rows_;
    }

  private:
    Rows rows_;
    Scratch values_, steps_, sums_, totals_;
};

// What a thread has of its own, and what it shares with those that help it.
struct Memory {
    QuantizedRows own_rows, own_hidden, shared_rows, shared_hidden;
    Scratch own_product, shared_product;
};

Memory& memory() {
    thread_local Memory mine;
    return mine;
}

bool valid(const Matrix& m) {
    return m.rows > 0 && m.columns > 0 && m.rows <= kMaxRows8 && (m.bits == 8 || m.bits == 4);
}
bool there(const Matrix& m) { return m.values != nullptr && (m.bits == 4 || m.scales != nullptr); }

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

// How rows are divided: parts, or 0 where there are too few of them and columns are divided.
std::int64_t row_parts(std::int64_t rows, std::int64_t products, const Pool& pool) {
    const std::int64_t threads = products < kAlone ? 1 : std::max(pool.threads, 1);
    if (threads > 1 && rows < threads * kFewest) return 0;
    const std::int64_t parts = (rows + kPart - 1) / kPart;
    return std::min(rows, (parts + threads - 1) / threads * threads);
}

// All columns of y, divided among threads in pairs of blocks, which is what a form takes at once.
bool by_columns(const Kernels& form, const Rows& a, const Matrix& weight, float* y, const Pool& pool) {
    const std::int64_t blocks = weight.column_blocks(), pairs = (blocks + 1) / 2;
    const std::int64_t parts = std::min<std::int64_t>(pool.threads, pairs);
    return run(pool, parts, [&](std::int64_t part) {
        const std::int64_t last = std::min(blocks, pairs * (part + 1) / parts * 2);
        form.linear(a, weight, pairs * part / parts * 2, last, y, weight.columns);
    });
}

}  // namespace

Pool serial_pool() noexcept {
    return {[](void*, std::size_t count, void (*task)(void*, std::size_t), void* data) {
                for (std::size_t i = 0; i < count; ++i) task(data, i);
            },
            nullptr, 1};
}

Status linear(const Matrix& weight, std::int64_t rows, const float* x, float* y, const Pool& pool) noexcept try {
    if (rows < 0 || !valid(weight)) return Status::kInvalidShape;
    if (rows == 0) return Status::kOk;
    if (!there(weight) || x == nullptr || y == nullptr) return Status::kNullPointer;
    const Kernels& form = kernels();
    const std::int64_t k = weight.rows, n = weight.columns;
    bool good;
    if (const std::int64_t parts = row_parts(rows, rows * k * n, pool); parts > 0) {
        good = run(pool, parts, [&](std::int64_t part) {
            const std::int64_t from = rows * part / parts, count = rows * (part + 1) / parts - from;
            const Rows& a = memory().own_rows.make(form, count, x + from * k, k, k);
            form.linear(a, weight, 0, weight.column_blocks(), y + from * n, n);
        });
    } else {
        good = by_columns(form, memory().shared_rows.make(form, rows, x, k, k), weight, y, pool);
    }
    return good ? Status::kOk : Status::kOutOfMemory;
} catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
}

Status mlp(const Matrix& gate, const Matrix& up, const Matrix& down, std::int64_t rows, const float* x, float* y,
           const Pool& pool) noexcept try {
    if (rows < 0 || !valid(gate) || !valid(up) || !valid(down)) return Status::kInvalidShape;
    if (gate.rows != up.rows || gate.columns != up.columns || gate.bits != up.bits || down.rows != gate.columns) {
        return Status::kInvalidShape;
    }
    if (rows == 0) return Status::kOk;
    if (!there(gate) || !there(up) || !there(down) || x == nullptr || y == nullptr) return Status::kNullPointer;
    const Kernels& form = kernels();
    const std::int64_t d = gate.rows, f = gate.columns, n = down.columns;
    bool good;
    if (const std::int64_t parts = row_parts(rows, rows * d * f, pool); parts > 0) {
        good = run(pool, parts, [&](std::int64_t part) {
            const std::int64_t from = rows * part / parts, count = rows * (part + 1) / parts - from;
            Memory& mine = memory();
            float* hidden = mine.own_product.take<float>(count * f);
            const Rows& a = mine.own_rows.make(form, count, x + from * d, d, d);
            form.gated(a, gate, up, 0, gate.column_blocks(), hidden, f);
            const Rows& h = mine.own_hidden.make(form, count, hidden, f, f);
            form.linear(h, down, 0, down.column_blocks(), y + from * n, n);
        });
    } else {
        Memory& mine = memory();
        float* hidden = mine.shared_product.take<float>(rows * f);
        const Rows& a = mine.shared_rows.make(form, rows, x, d, d);
        const std::int64_t wide = gate.column_blocks(), count = std::min<std::int64_t>(pool.threads, wide);
        good = run(pool, count, [&](std::int64_t part) {
            form.gated(a, gate, up, wide * part / count, wide * (part + 1) / count, hidden, f);
        });
        good = by_columns(form, mine.shared_hidden.make(form, rows, hidden, f, f), down, y, pool) && good;
    }
    return good ? Status::kOk : Status::kOutOfMemory;
} catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
}

const char* rows8_instructions() noexcept { return kernels().name; }
void rows8_use_portable(bool portable) noexcept { use_portable = portable; }

}  // namespace reroute
