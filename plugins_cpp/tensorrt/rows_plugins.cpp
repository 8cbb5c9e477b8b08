#include "rows_plugins.h"

#include <algorithm>

namespace reroute::trt {

using nvinfer1::DataType;
using nvinfer1::Dims;

namespace {

enum Input { kFull, kSlots, kRows };

RowsShape shape_of(const Dims& full, const Dims& slots, DataType type) {
    const std::int64_t element_bytes = type == DataType::kFLOAT ? 4 : 2;
    return {full.d[0], full.d[1], slots.d[1], full.d[2] * element_bytes};
}

std::string rows_problem(const Dims& full, const Dims& slots, RowsShape shape) {
    if (slots.d[0] != full.d[0]) {
        return "batch sizes differ: slots " + text_of(slots) + " and full sequence " + text_of(full);
    }
    const Status status = check(shape);
    if (status == Status::kOk) return {};
    return std::string(describe(status)) + ": full sequence " + text_of(full) + ", slots " + text_of(slots);
}

}  // namespace

GatherPlugin::GatherPlugin() : RoutingPlugin("RerouteGather", {{false, 3}, {true, 2}, {false, 3}}) {}

nvinfer1::DimsExprs GatherPlugin::output_shape(nvinfer1::DimsExprs const* in, nvinfer1::IExprBuilder&) const {
    nvinfer1::DimsExprs out = in[kFull];
    out.d[1] = in[kSlots].d[1];
    return out;
}

std::string GatherPlugin::problem(const Call& call, bool) const {
    return rows_problem(call.dims[kFull], call.dims[kSlots], shape_of(call.dims[kFull], call.dims[kSlots], call.type));
}

Status GatherPlugin::run(const Call& call, void const* const* in, void* out, void*, cudaStream_t stream) const {
    const RowsShape shape = shape_of(call.dims[kFull], call.dims[kSlots], call.type);
    return gather_cuda_fast(shape, in[kFull], static_cast<const std::int64_t*>(in[kSlots]), out, stream);
}

ScatterPlugin::ScatterPlugin() : RoutingPlugin("RerouteScatter", {{false, 3}, {true, 2}, {false, 3}, {false, 3}}) {}

nvinfer1::DimsExprs ScatterPlugin::output_shape(nvinfer1::DimsExprs const* in, nvinfer1::IExprBuilder&) const {
    return in[kFull];
}

std::string ScatterPlugin::problem(const Call& call, bool bounds) const {
    const Dims& full = call.dims[kFull];
    const Dims& slots = call.dims[kSlots];
    const Dims& rows = call.dims[kRows];
    // The bounds of slots and rows come from different expressions and need not agree.
    const bool lengths_fit = bounds || (rows.d[1] == slots.d[1] && slots.d[1] <= full.d[1]);
    if (rows.d[0] != full.d[0] || rows.d[2] != full.d[2] || !lengths_fit) {
        return "rows " + text_of(rows) + " do not fit slots " + text_of(slots) + " and full sequence " + text_of(full);
    }
    return rows_problem(full, slots, shape_of(full, slots, call.type));
}

Status ScatterPlugin::run(const Call& call, void const* const* in, void* out, void*, cudaStream_t stream) const {
    const RowsShape shape = shape_of(call.dims[kFull], call.dims[kSlots], call.type);
    return scatter_cuda_fast(shape, in[kFull], static_cast<const std::int64_t*>(in[kSlots]), in[kRows], out, stream);
}

}  // namespace reroute::trt
