// Attention (q, k, v, past keys, past values, valid) -> out, keys, values            attributes num_heads, num_kv_heads, scale
//
// Shapes are those of reroute/attention.h; valid is int32 [1]. An output of caches that is bound to the memory of the past
// ones is written in place.
#include "reroute/attention.h"

#include "kernel.h"

namespace reroute::ort {
namespace {

struct Attention : Node {
    std::int64_t heads = 0, groups = 0;
    float scale = 1;
};

bool is(const Shape& shape, std::int64_t a, std::int64_t b, std::int64_t c) {
    return shape.rank == 3 && shape.sizes[0] == a && shape.sizes[1] == b && shape.sizes[2] == c;
}

struct AttentionOp {
    using Kernel = Attention;
    static constexpr const char* kName = "Attention";
    static constexpr std::size_t kRequiredInputs = 6, kRequiredOutputs = 3;
    static constexpr ElementType kInputs[] = {kFloat, kFloat, kFloat, kFloat, kFloat, kInt32};
    static constexpr ElementType kOutputs[] = {kFloat, kFloat, kFloat};

    static void make(Attributes& attributes, Attention& node) {
        node.heads = attributes.whole("num_heads");
        node.groups = attributes.whole("num_kv_heads");
        node.scale = attributes.real("scale");
    }
    static Error* compute(const Attention& a, KernelContext* context, const Pool& pool, Status* status) {
        Shape q_shape, k_shape, v_shape, keys_shape, values_shape, valid_shape;
        const float *q = nullptr, *k = nullptr, *v = nullptr, *past_keys = nullptr, *past_values = nullptr;
        const std::int32_t* valid = nullptr;
        if (Error* error = input(a.api, context, 0, &q_shape, &q)) return error;
        if (Error* error = input(a.api, context, 1, &k_shape, &k)) return error;
        if (Error* error = input(a.api, context, 2, &v_shape, &v)) return error;
        if (Error* error = input(a.api, context, 3, &keys_shape, &past_keys)) return error;
        if (Error* error = input(a.api, context, 4, &values_shape, &past_values)) return error;
        if (Error* error = input(a.api, context, 5, &valid_shape, &valid)) return error;

        AttentionShape shape;
        shape.heads = a.heads;
        shape.groups = a.groups;
        shape.scale = a.scale;
        if (q_shape.rank == 3 && keys_shape.rank == 4 && valid_shape.rank == 1 && valid_shape.last() == 1) {
            shape.batch = q_shape.sizes[0];
            shape.rows = q_shape.sizes[1];
            shape.capacity = keys_shape.sizes[2];
            shape.size = keys_shape.last();
            shape.valid = *valid;
        }
        const std::int64_t width = shape.groups * shape.size;
        bool good = is(q_shape, shape.batch, shape.rows, shape.heads * shape.size) && values_shape.rank == 4 &&
                    is(k_shape, shape.batch, shape.rows, width) && is(v_shape, shape.batch, shape.rows, width) &&
                    keys_shape.sizes[0] == shape.batch && keys_shape.sizes[1] == shape.groups;
        for (std::size_t i = 0; i < 4; ++i) good = good && keys_shape.sizes[i] == values_shape.sizes[i];
        if (!good) return fail(a.api, kInvalidArgument, "the shapes of q, k, v and the caches do not fit each other");

        float *out = nullptr, *keys = nullptr, *values = nullptr;
        if (Error* error = output(a.api, context, 0, q_shape, &out)) return error;
        if (Error* error = output(a.api, context, 1, keys_shape, &keys)) return error;
        if (Error* error = output(a.api, context, 2, values_shape, &values)) return error;
        *status = attention(shape, q, k, v, past_keys, past_values, keys, values, out, pool);
        return nullptr;
    }
};

}  // namespace

CustomOp attention_op() { return described_by<AttentionOp>(); }

}  // namespace reroute::ort
