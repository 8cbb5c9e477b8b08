//   Linear (x, matrix) -> y                                            K, N, bits
//   Linears (x, norm, matrix, matrix[, matrix]) -> y, y[, y]           count, K, N0, bits0, ..., epsilon
//   Mlp (x, gate, up, down) -> y                                       K, F, N, bits
//   RestOfLayer (h, a, output, norm, gate, up, down) -> y              K, D, F, output_bits, bits, epsilon
//
// Rows are float [..., K], norms float [K]; matrices, and what is computed, are as in reroute/rows8.h.
#include <atomic>

#include "kernel.h"
#include "reroute/rows8.h"

namespace reroute::ort {
namespace {

// What a node is made from; each operator has some of it.
struct Product : Node {
    std::atomic<bool> checked{false};  // that its matrices are of their size: they are the graph's and do not change
    Matrix matrices[3];                // of a linear, several, or a gated MLP, without the values
    int count = 1;                     // of several
    Matrix output;
    float epsilon = 0;
};

Matrix matrix_of(Attributes& attributes, std::int64_t rows, std::int64_t columns, const char* bits) {
    return {rows, columns, static_cast<int>(attributes.whole(bits)), nullptr};
}

// Reads a call's inputs one after the other; the first error stays.
class Inputs {
  public:
    Inputs(Product& node, const KernelContext* context) : node_(node), context_(context) {}

    // Rows of `width`; `like` are rows that must be as many.
    const float* rows(std::int64_t width, Shape* shape, const Shape* like = nullptr) {
        const float* data = nullptr;
        if (error_ == nullptr) error_ = input(node_.api, context_, next_++, shape, &data);
        if (error_ != nullptr) return nullptr;
        bool good = shape->last() == width && (like == nullptr || like->rank == shape->rank);
        for (std::size_t i = 0; good && like != nullptr && i + 1 < shape->rank; ++i) {
            good = like->sizes[i] == shape->sizes[i];
        }
        if (!good) error_ = fail(node_.api, kInvalidArgument, "the last dimension of rows is not the matrix's");
        return data;
    }
    Matrix matrix(Matrix matrix) {
        matrix.values = data<std::uint8_t>(matrix.bytes());
        return matrix;
    }
    Norm norm(std::int64_t width) { return {data<float>(width), node_.epsilon}; }
    // The first error; without one, the matrices are of their size.
    Error* error() const {
        if (error_ == nullptr) node_.checked = true;
        return error_;
    }

  private:
    // A tensor of the graph of `count` elements.
    template <typename T>
    const T* data(std::int64_t count) {
        const Value* value = nullptr;
        const T* found = nullptr;
        if (error_ == nullptr) error_ = KernelContextGetInput::call(node_.api, context_, next_++, &value);
        if (error_ == nullptr && !node_.checked) error_ = require_count(node_.api, value, count);
        if (error_ == nullptr) error_ = data_of(node_.api, value, &found);
        return found;
    }

    static Error* require_count(const Api* api, const Value* value, std::int64_t count) {
        TensorInfo* info = nullptr;
        if (Error* error = GetTensorTypeAndShape::call(api, value, &info)) return error;
        std::size_t have = 0;
        Error* error = GetTensorShapeElementCount::call(api, info, &have);
        ReleaseTensorTypeAndShapeInfo::call(api, info);
        if (error != nullptr || have == static_cast<std::size_t>(count)) return error;
        return fail(api, kInvalidArgument, "a matrix is not of the size that the node says");
    }

    Product& node_;
    const KernelContext* context_;
    std::size_t next_ = 0;
    Error* error_ = nullptr;
};

std::int64_t count_of(const Shape& rows) {
    std::int64_t count = 1;
    for (std::size_t i = 0; i + 1 < rows.rank; ++i) count *= rows.sizes[i];
    return count;
}

// An output with the rows of `shape`, of another width.
Error* output_rows(Product& node, KernelContext* context, std::size_t index, Shape shape, std::int64_t width,
                   float** y) {
    shape.sizes[shape.rank - 1] = width;
    return output(node.api, context, index, shape, y);
}

struct LinearOp {
    using Kernel = Product;
    static constexpr const char* kName = "Linear";
    static constexpr std::size_t kRequiredInputs = 2, kRequiredOutputs = 1;
    static constexpr ElementType kInputs[] = {kFloat, kUint8};
    static constexpr ElementType kOutputs[] = {kFloat};

    static void make(Attributes& attributes, Product& node) {
        node.matrices[0] = matrix_of(attributes, attributes.whole("K"), attributes.whole("N"), "bits");
    }
    static Error* compute(Product& node, KernelContext* context, const Pool& pool, Status* status) {
        Inputs in(node, context);
        Shape shape;
        const float* x = in.rows(node.matrices[0].rows, &shape);
        const Matrix weight = in.matrix(node.matrices[0]);
        float* y = nullptr;
        if (Error* error = in.error()) return error;
        if (Error* error = output_rows(node, context, 0, shape, weight.columns, &y)) return error;
        *status = linear(weight, count_of(shape), x, y, pool);
        return nullptr;
    }
};

struct LinearsOp {
    using Kernel = Product;
    static constexpr const char* kName = "Linears";
    static constexpr std::size_t kRequiredInputs = 4, kRequiredOutputs = 2;
    static constexpr ElementType kInputs[] = {kFloat, kFloat, kUint8, kUint8, kUint8};
    static constexpr ElementType kOutputs[] = {kFloat, kFloat, kFloat};

    static void make(Attributes& attributes, Product& node) {
        static constexpr const char* kColumns[] = {"N0", "N1", "N2"};
        static constexpr const char* kBits[] = {"bits0", "bits1", "bits2"};
        const std::int64_t k = attributes.whole("K");
        node.count = attributes.whole("count") == 2 ? 2 : 3;
        for (int i = 0; i < node.count; ++i) {
            node.matrices[i] = matrix_of(attributes, k, attributes.whole(kColumns[i]), kBits[i]);
        }
        node.epsilon = attributes.real("epsilon");
    }
    static Error* compute(Product& node, KernelContext* context, const Pool& pool, Status* status) {
        Inputs in(node, context);
        Shape shape;
        const std::int64_t k = node.matrices[0].rows;
        const float* x = in.rows(k, &shape);
        const Norm norm = in.norm(k);
        Matrix weights[3];
        float* ys[3] = {};
        for (int i = 0; i < node.count; ++i) weights[i] = in.matrix(node.matrices[i]);
        if (Error* error = in.error()) return error;
        for (int i = 0; i < node.count; ++i) {
            const auto place = static_cast<std::size_t>(i);
            if (Error* error = output_rows(node, context, place, shape, weights[i].columns, &ys[i])) return error;
        }
        *status = linears(norm, weights, ys, node.count, count_of(shape), x, pool);
        return nullptr;
    }
};

// Gate, up and down of a node, of widths `outer` and `inner`.
void make_mlp(Attributes& attributes, Product& node, std::int64_t in, std::int64_t out) {
    const std::int64_t hidden = attributes.whole("F");
    node.matrices[0] = node.matrices[1] = matrix_of(attributes, in, hidden, "bits");
    node.matrices[2] = matrix_of(attributes, hidden, out, "bits");
}
Mlp mlp_of(Product& node, Inputs& in) {
    Mlp made;
    made.gate = in.matrix(node.matrices[0]);
    made.up = in.matrix(node.matrices[1]);
    made.down = in.matrix(node.matrices[2]);
    return made;
}

struct MlpOp {
    using Kernel = Product;
    static constexpr const char* kName = "Mlp";
    static constexpr std::size_t kRequiredInputs = 4, kRequiredOutputs = 1;
    static constexpr ElementType kInputs[] = {kFloat, kUint8, kUint8, kUint8};
    static constexpr ElementType kOutputs[] = {kFloat};

    static void make(Attributes& attributes, Product& node) {
        const std::int64_t in = attributes.whole("K"), out = attributes.whole("N");
        make_mlp(attributes, node, in, out);
    }
    static Error* compute(Product& node, KernelContext* context, const Pool& pool, Status* status) {
        Inputs in(node, context);
        Shape shape;
        const float* x = in.rows(node.matrices[0].rows, &shape);
        const Mlp weights = mlp_of(node, in);
        float* y = nullptr;
        if (Error* error = in.error()) return error;
        if (Error* error = output_rows(node, context, 0, shape, weights.down.columns, &y)) return error;
        *status = mlp(weights, count_of(shape), x, y, pool);
        return nullptr;
    }
};

struct RestOfLayerOp {
    using Kernel = Product;
    static constexpr const char* kName = "RestOfLayer";
    static constexpr std::size_t kRequiredInputs = 7, kRequiredOutputs = 1;
    static constexpr ElementType kInputs[] = {kFloat, kFloat, kUint8, kFloat, kUint8, kUint8, kUint8};
    static constexpr ElementType kOutputs[] = {kFloat};

    static void make(Attributes& attributes, Product& node) {
        const std::int64_t width = attributes.whole("D");
        node.output = matrix_of(attributes, attributes.whole("K"), width, "output_bits");
        make_mlp(attributes, node, width, width);
        node.epsilon = attributes.real("epsilon");
    }
    static Error* compute(Product& node, KernelContext* context, const Pool& pool, Status* status) {
        Inputs in(node, context);
        Shape shape, attended;
        const std::int64_t width = node.output.columns;
        const float* h = in.rows(width, &shape);
        const float* a = in.rows(node.output.rows, &attended, &shape);
        const Matrix output_matrix = in.matrix(node.output);
        const Norm norm = in.norm(width);
        const Mlp weights = mlp_of(node, in);
        float* y = nullptr;
        if (Error* error = in.error()) return error;
        if (Error* error = output_rows(node, context, 0, shape, width, &y)) return error;
        *status = rest_of_layer(output_matrix, norm, weights, count_of(shape), h, a, y, pool);
        return nullptr;
    }
};

}  // namespace

CustomOp linear_op() { return described_by<LinearOp>(); }
CustomOp linears_op() { return described_by<LinearsOp>(); }
CustomOp mlp_op() { return described_by<MlpOp>(); }
CustomOp rest_of_layer_op() { return described_by<RestOfLayerOp>(); }

}  // namespace reroute::ort
