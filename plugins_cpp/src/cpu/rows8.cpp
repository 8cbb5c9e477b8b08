// Products of int8 rows: checks, and which thread does what.
#include "reroute/rows8.h"

#include <algorithm>
#include <new>

#include "rows8_kernels.h"
#include "tasks.h"

namespace reroute {
namespace {

using rows8::Kernels;
using rows8::Rows;

constexpr std::int64_t kPart = 48;   // rows of a part at most: what an MLP holds of them fits a core's cache
constexpr std::int64_t kFewest = 8;  // rows of a part at least, before columns are divided too

const Kernels& kernels() noexcept { return cpu::fast() ? rows8::kFast : rows8::kPortable; }

// Quantised rows of a thread.
class QuantizedRows {
  public:
    const Rows& make(const Kernels& form, std::int64_t count, const float* x, std::int64_t width) {
        const std::int64_t stride = (width + 63) / 64 * 64;
        rows_ = Rows{count,
                     stride,
                     values_.take<std::int8_t>(count * stride),
                     steps_.take<float>(count),
                     sums_.take<std::int32_t>(count * stride / 64),
                     totals_.take<std::int32_t>(count)};
        form.quantize(x, width, rows_);
        return rows_;
    }

  private:
    Rows rows_;
    cpu::Scratch values_, steps_, sums_, totals_;
};

// What a thread has of its own, and what it shares with those that help it.
struct Memory {
    QuantizedRows rows, hidden;
    cpu::Scratch normed, residual, product;
};

Memory& own() {
    thread_local Memory mine;
    return mine;
}
Memory& shared() {
    thread_local Memory mine;
    return mine;
}

bool valid(const Matrix& m) {
    return m.rows > 0 && m.columns > 0 && m.rows <= kMaxRows8 && (m.bits == 8 || m.bits == 4);
}
bool valid(const Mlp& m) {
    return valid(m.gate) && valid(m.up) && valid(m.down) && m.gate.rows == m.up.rows && m.gate.bits == m.up.bits &&
           m.gate.columns == m.up.columns && m.down.rows == m.gate.columns;
}
bool there(const Matrix& m) { return m.values != nullptr; }
bool there(const Mlp& m) { return there(m.gate) && there(m.up) && there(m.down); }

// Rows of one thread.
struct Part {
    std::int64_t from, count;
};

// How rows are divided: parts, or 0 where there are too few of them and columns are divided.
std::int64_t row_parts(std::int64_t rows, std::int64_t products, const Pool& pool) {
    const std::int64_t threads = products < cpu::kAlone ? 1 : std::max(pool.threads, 1);
    if (threads > 1 && rows < threads * kFewest) return 0;
    const std::int64_t parts = (rows + kPart - 1) / kPart;
    return std::min(rows, (parts + threads - 1) / threads * threads);
}

// Calls task(Part) for all rows.
template <typename Task>
bool by_rows(std::int64_t rows, std::int64_t parts, const Pool& pool, const Task& task) {
    return cpu::run(pool, parts, [&](std::int64_t part) {
        const std::int64_t from = rows * part / parts;
        task(Part{from, rows * (part + 1) / parts - from});
    });
}

// Calls task(first, last) for all of `blocks`, divided among threads; what begins is even, as a form takes two at once.
template <typename Task>
bool by_columns(std::int64_t blocks, const Pool& pool, const Task& task) {
    const std::int64_t pairs = (blocks + 1) / 2, parts = std::min<std::int64_t>(pool.threads, pairs);
    return cpu::run(pool, parts, [&](std::int64_t part) {
        task(pairs * part / parts * 2, std::min(blocks, pairs * (part + 1) / parts * 2));
    });
}

// Norms `count` rows into `scratch`, if there is a norm; returns where the rows are.
const float* normed(const Kernels& form, const Norm& norm, const float* x, std::int64_t count, std::int64_t width,
                    cpu::Scratch& scratch) {
    if (norm.weight == nullptr) return x;
    float* y = scratch.take<float>(count * width);
    form.norm(x, count, width, norm.weight, norm.epsilon, y);
    return y;
}

// y = a * weight, columns divided.
bool quantised_linear(const Kernels& form, const Matrix& weight, const Rows& a, float* y, const Pool& pool) {
    return by_columns(weight.column_blocks(), pool, [&](std::int64_t first, std::int64_t last) {
        form.linear(a, weight, first, last, y, weight.columns);
    });
}

// Both forms of a gated MLP: alone, and with what is before it in a layer, if there is an output matrix.
bool feed(const Matrix* output, const Norm& norm, const Mlp& mlp, std::int64_t rows, const float* x, const float* a,
          float* y, const Pool& pool) {
    const Kernels& form = kernels();
    const std::int64_t d = mlp.gate.rows, f = mlp.gate.columns, n = mlp.down.columns;
    if (const std::int64_t parts = row_parts(rows, rows * d * f, pool); parts > 0) {
        return by_rows(rows, parts, pool, [&](const Part& part) {
            Memory& mine = own();
            const float* residual = x + part.from * d;
            if (output != nullptr) {
                float* sum = mine.residual.take<float>(part.count * d);
                const std::int64_t k = output->rows;
                const Rows& attended = mine.rows.make(form, part.count, a + part.from * k, k);
                form.linear(attended, *output, 0, output->column_blocks(), sum, d);
                form.add(residual, sum, part.count * d);
                residual = sum;
            }
            const float* in = normed(form, norm, residual, part.count, d, mine.normed);
            float* hidden = mine.product.take<float>(part.count * f);
            form.gated(mine.rows.make(form, part.count, in, d), mlp.gate, mlp.up, 0, mlp.gate.column_blocks(), hidden,
                       f);
            const Rows& h = mine.hidden.make(form, part.count, hidden, f);
            form.linear(h, mlp.down, 0, mlp.down.column_blocks(), y + part.from * n, n);
            if (output != nullptr) form.add(residual, y + part.from * n, part.count * n);
        });
    }
    Memory& mine = shared();
    const float* residual = x;
    bool good = true;
    if (output != nullptr) {
        float* sum = mine.residual.take<float>(rows * d);
        good = quantised_linear(form, *output, mine.rows.make(form, rows, a, output->rows), sum, pool);
        form.add(x, sum, rows * d);
        residual = sum;
    }
    const Rows& in = mine.rows.make(form, rows, normed(form, norm, residual, rows, d, mine.normed), d);
    float* hidden = mine.product.take<float>(rows * f);
    good = good && by_columns(mlp.gate.column_blocks(), pool, [&](std::int64_t first, std::int64_t last) {
               form.gated(in, mlp.gate, mlp.up, first, last, hidden, f);
           });
    good = good && quantised_linear(form, mlp.down, mine.hidden.make(form, rows, hidden, f), y, pool);
    if (output != nullptr) form.add(residual, y, rows * n);
    return good;
}

Status told(bool good) { return good ? Status::kOk : Status::kOutOfMemory; }

}  // namespace

Status linear(const Matrix& weight, std::int64_t rows, const float* x, float* y, const Pool& pool) noexcept {
    return linears({}, &weight, &y, 1, rows, x, pool);
}

Status linears(const Norm& norm, const Matrix* weights, float* const* ys, int count, std::int64_t rows, const float* x,
               const Pool& pool) noexcept try {
    if (rows < 0 || count < 1) return Status::kInvalidShape;
    const Matrix *const end = weights + count, &first = *weights;
    std::int64_t blocks = 0, columns = 0;
    for (const Matrix* one = weights; one != end; ++one) {
        if (!valid(*one) || one->rows != first.rows) return Status::kInvalidShape;
        blocks += one->column_blocks();
        columns += one->columns;
    }
    if (rows == 0) return Status::kOk;
    if (x == nullptr || !std::all_of(weights, end, [](const Matrix& m) { return there(m); }) ||
        std::find(ys, ys + count, nullptr) != ys + count) {
        return Status::kNullPointer;
    }
    const Kernels& form = kernels();
    const std::int64_t k = first.rows;
    if (const std::int64_t parts = row_parts(rows, rows * k * columns, pool); parts > 0) {
        return told(by_rows(rows, parts, pool, [&](const Part& part) {
            Memory& mine = own();
            const float* in = normed(form, norm, x + part.from * k, part.count, k, mine.normed);
            const Rows& a = mine.rows.make(form, part.count, in, k);
            for (int i = 0; i < count; ++i) {
                const std::int64_t n = weights[i].columns;
                form.linear(a, weights[i], 0, weights[i].column_blocks(), ys[i] + part.from * n, n);
            }
        }));
    }
    Memory& mine = shared();
    const Rows& a = mine.rows.make(form, rows, normed(form, norm, x, rows, k, mine.normed), k);
    return told(by_columns(blocks, pool, [&](std::int64_t from, std::int64_t to) {
        std::int64_t before = 0;  // blocks of the matrices before
        for (int i = 0; i < count; ++i) {
            const std::int64_t have = weights[i].column_blocks();
            const std::int64_t begin = std::clamp<std::int64_t>(from - before, 0, have);
            const std::int64_t stop = std::clamp<std::int64_t>(to - before, 0, have);
            form.linear(a, weights[i], begin, stop, ys[i], weights[i].columns);
            before += have;
        }
    }));
} catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
}

Status mlp(const Mlp& mlp, std::int64_t rows, const float* x, float* y, const Pool& pool) noexcept try {
    if (rows < 0 || !valid(mlp)) return Status::kInvalidShape;
    if (rows == 0) return Status::kOk;
    if (!there(mlp) || x == nullptr || y == nullptr) return Status::kNullPointer;
    return told(feed(nullptr, {}, mlp, rows, x, nullptr, y, pool));
} catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
}

Status rest_of_layer(const Matrix& output, const Norm& norm, const Mlp& mlp, std::int64_t rows, const float* h,
                     const float* a, float* y, const Pool& pool) noexcept try {
    const std::int64_t d = mlp.gate.rows;
    if (rows < 0 || !valid(mlp) || !valid(output) || output.columns != d || mlp.down.columns != d) {
        return Status::kInvalidShape;
    }
    if (rows == 0) return Status::kOk;
    if (!there(mlp) || !there(output) || norm.weight == nullptr || h == nullptr || a == nullptr || y == nullptr) {
        return Status::kNullPointer;
    }
    return told(feed(&output, norm, mlp, rows, h, a, y, pool));
} catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
}

}  // namespace reroute
