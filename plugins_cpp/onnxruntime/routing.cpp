// RerouteSelect (q_last, keys, candidates, always) -> slots          keep, num_heads, num_kv_heads, scale
// RerouteGather (x, slots) -> rows
// RerouteScatter (full, slots, rows) -> updated
//
// The ops of export/ops.py with the names, inputs and attributes of the TensorRT plugins (plugins_cpp/README.md has their
// contract), in float32.
#include "kernel.h"
#include "reroute/rows.h"
#include "reroute/select.h"

namespace reroute::ort {
namespace {

struct Select : Node {
    SelectShape shape;  // what its attributes say
};

Error* misfit(const Api* api) { return fail(api, kInvalidArgument, "the shapes of the inputs do not fit each other"); }

// The rows of `full` and the slots, of three and two dimensions.
Status shape_of_rows(const Shape& full, const Shape& slots, RowsShape* shape) {
    if (full.rank != 3 || slots.rank != 2 || full.sizes[0] != slots.sizes[0]) return Status::kInvalidShape;
    *shape = {full.sizes[0], full.sizes[1], slots.sizes[1], full.sizes[2] * static_cast<std::int64_t>(sizeof(float))};
    return Status::kOk;
}

struct SelectOp {
    using Kernel = Select;
    static constexpr std::size_t kRequiredInputs = 4, kRequiredOutputs = 1;
    static constexpr const char* kName = "RerouteSelect";
    static constexpr ElementType kInputs[] = {kFloat, kFloat, kInt64, kInt64};
    static constexpr ElementType kOutputs[] = {kInt64};

    static void make(Attributes& attributes, Select& node) {
        node.shape.keep = attributes.whole("keep");
        node.shape.heads = attributes.whole("num_heads");
        node.shape.kv_heads = attributes.whole("num_kv_heads");
        node.shape.scale = attributes.real("scale");
    }
    static Error* compute(const Select& node, KernelContext* context, const Pool& pool, Status* status) {
        Shape q, keys, candidates, always;
        const float *q_data = nullptr, *key_data = nullptr;
        const std::int64_t *candidate_data = nullptr, *always_data = nullptr;
        if (Error* error = input(node.api, context, 0, &q, &q_data)) return error;
        if (Error* error = input(node.api, context, 1, &keys, &key_data)) return error;
        if (Error* error = input(node.api, context, 2, &candidates, &candidate_data)) return error;
        if (Error* error = input(node.api, context, 3, &always, &always_data)) return error;
        SelectShape s = node.shape;
        if (q.rank != 2 || keys.rank != 3 || candidates.rank != 2 || always.rank != 2) return misfit(node.api);
        s.batch = q.sizes[0];
        s.rows = keys.sizes[1];
        s.candidates = candidates.sizes[1];
        s.always = always.sizes[1];
        s.head_size = s.heads > 0 ? q.sizes[1] / s.heads : 0;
        if (keys.sizes[0] != s.batch || candidates.sizes[0] != s.batch || always.sizes[0] != s.batch ||
            q.sizes[1] != s.heads * s.head_size || keys.sizes[2] != s.kv_heads * s.head_size) {
            return misfit(node.api);
        }
        if (*status = check(s); *status != Status::kOk) return nullptr;
        std::int64_t* slots = nullptr;
        const Shape made{{s.batch, select_length(s)}, 2};
        if (Error* error = output(node.api, context, 0, made, &slots)) return error;
        *status = select_cpu_fast(s, {q_data, key_data, candidate_data, always_data}, slots, pool);
        return nullptr;
    }
};

struct GatherOp {
    using Kernel = Node;
    static constexpr std::size_t kRequiredInputs = 2, kRequiredOutputs = 1;
    static constexpr const char* kName = "RerouteGather";
    static constexpr ElementType kInputs[] = {kFloat, kInt64};
    static constexpr ElementType kOutputs[] = {kFloat};

    static void make(Attributes&, Node&) {}
    static Error* compute(const Node& node, KernelContext* context, const Pool& pool, Status* status) {
        Shape full, slots;
        const float* full_data = nullptr;
        const std::int64_t* slot_data = nullptr;
        if (Error* error = input(node.api, context, 0, &full, &full_data)) return error;
        if (Error* error = input(node.api, context, 1, &slots, &slot_data)) return error;
        RowsShape shape;
        if (shape_of_rows(full, slots, &shape) != Status::kOk) return misfit(node.api);
        float* picked = nullptr;
        const Shape made{{shape.batch, shape.picked, full.sizes[2]}, 3};
        if (Error* error = output(node.api, context, 0, made, &picked)) return error;
        *status = gather_cpu_fast(shape, full_data, slot_data, picked, pool);
        return nullptr;
    }
};

struct ScatterOp {
    using Kernel = Node;
    static constexpr std::size_t kRequiredInputs = 3, kRequiredOutputs = 1;
    static constexpr const char* kName = "RerouteScatter";
    static constexpr ElementType kInputs[] = {kFloat, kInt64, kFloat};
    static constexpr ElementType kOutputs[] = {kFloat};

    static void make(Attributes&, Node&) {}
    static Error* compute(const Node& node, KernelContext* context, const Pool& pool, Status* status) {
        Shape full, slots, rows;
        const float *full_data = nullptr, *row_data = nullptr;
        const std::int64_t* slot_data = nullptr;
        if (Error* error = input(node.api, context, 0, &full, &full_data)) return error;
        if (Error* error = input(node.api, context, 1, &slots, &slot_data)) return error;
        if (Error* error = input(node.api, context, 2, &rows, &row_data)) return error;
        RowsShape shape;
        if (shape_of_rows(full, slots, &shape) != Status::kOk || rows.rank != 3 || rows.sizes[0] != shape.batch ||
            rows.sizes[1] != shape.picked || rows.sizes[2] != full.sizes[2]) {
            return misfit(node.api);
        }
        float* updated = nullptr;
        if (Error* error = output(node.api, context, 0, full, &updated)) return error;
        *status = scatter_cpu_fast(shape, full_data, slot_data, row_data, updated, pool);
        return nullptr;
    }
};

}  // namespace

CustomOp select_op() { return described_by<SelectOp>(); }
CustomOp gather_op() { return described_by<GatherOp>(); }
CustomOp scatter_op() { return described_by<ScatterOp>(); }

}  // namespace reroute::ort
