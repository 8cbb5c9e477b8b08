#include "routing_plugin.h"

#include <exception>

#include "log.h"

namespace reroute::trt {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

namespace {

bool is_row_type(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

}  // namespace

std::string text_of(const nvinfer1::Dims& dims) {
    std::string text = "[";
    for (std::int32_t i = 0; i < dims.nbDims; ++i) text += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
    return text + "]";
}

nvinfer1::IPluginCapability* RoutingPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* RoutingPlugin::clone() noexcept {
    try {
        return copy();
    } catch (const std::exception& error) {
        answer(std::string("cannot be cloned: ") + error.what());
        return nullptr;
    }
}

std::int32_t RoutingPlugin::answer(const std::string& problem) const noexcept {
    if (problem.empty()) return 0;
    log_error(std::string(name_) + ": " + problem);
    return -1;
}

std::string RoutingPlugin::rank_problem(const Call& call) const {
    for (std::size_t i = 0; i < static_cast<std::size_t>(call.count); ++i) {
        if (call.dims[i].nbDims != rules_[i].rank) {
            return "input " + std::to_string(i) + " has shape " + text_of(call.dims[i]) + "; it must have rank " +
                   std::to_string(rules_[i].rank);
        }
    }
    return {};
}

std::int32_t RoutingPlugin::configurePlugin(DynamicPluginTensorDesc const* in, std::int32_t in_count,
                                            DynamicPluginTensorDesc const*, std::int32_t out_count) noexcept {
    if (in_count != inputs() || out_count != 1) {
        return answer("takes " + std::to_string(inputs()) + " inputs and 1 output; it got " + std::to_string(in_count) +
                      " and " + std::to_string(out_count));
    }
    const Call call = largest_call(in);
    const std::string wrong_rank = rank_problem(call);
    return answer(wrong_rank.empty() ? problem(call, true) : wrong_rank);
}

std::int32_t RoutingPlugin::getOutputDataTypes(DataType* out, std::int32_t out_count, DataType const* in,
                                               std::int32_t in_count) const noexcept {
    if (in_count != inputs() || out_count != 1) return -1;
    out[0] = rules_.back().slots ? DataType::kINT64 : in[0];
    return 0;
}

std::int32_t RoutingPlugin::getOutputShapes(nvinfer1::DimsExprs const* in, std::int32_t in_count,
                                            nvinfer1::DimsExprs const*, std::int32_t, nvinfer1::DimsExprs* out,
                                            std::int32_t out_count, nvinfer1::IExprBuilder& builder) noexcept {
    if (in_count != inputs() || out_count != 1) return -1;
    for (std::int32_t i = 0; i < in_count; ++i) {
        const std::int32_t rank = rules_[static_cast<std::size_t>(i)].rank;
        if (in[i].nbDims != rank) {
            return answer("input " + std::to_string(i) + " has rank " + std::to_string(in[i].nbDims) +
                          "; it must have rank " + std::to_string(rank));
        }
    }
    out[0] = output_shape(in, builder);
    return 0;
}

bool RoutingPlugin::supportsFormatCombination(std::int32_t position, DynamicPluginTensorDesc const* tensors,
                                              std::int32_t in_count, std::int32_t out_count) noexcept {
    if (in_count != inputs() || out_count != 1 || position < 0 || position > in_count) return false;
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::PluginFormat::kLINEAR) return false;
    if (rules_[static_cast<std::size_t>(position)].slots) return tensor.type == DataType::kINT64;
    return position == 0 ? is_row_type(tensor.type) : tensor.type == tensors[0].desc.type;
}

std::int32_t RoutingPlugin::onShapeChange(PluginTensorDesc const* in, std::int32_t in_count, PluginTensorDesc const*,
                                          std::int32_t) noexcept {
    if (in_count != inputs()) return -1;
    const Call call = actual_call(in);
    const std::string wrong_rank = rank_problem(call);
    return answer(wrong_rank.empty() ? problem(call, false) : wrong_rank);
}

std::int32_t RoutingPlugin::enqueue(PluginTensorDesc const* in_desc, PluginTensorDesc const*, void const* const* in,
                                    void* const* out, void* workspace, cudaStream_t stream) noexcept {
    const Call call = actual_call(in_desc);
    const Status status = run(call, in, out[0], workspace, stream);
    if (status == Status::kOk) return 0;
    std::string message = describe(status);
    if (status == Status::kCuda) message += std::string(": ") + cuda_error_message();
    for (std::int32_t i = 0; i < call.count; ++i) message += ", " + text_of(call.dims[static_cast<std::size_t>(i)]);
    return answer(message);
}

nvinfer1::PluginFieldCollection const* RoutingPlugin::getFieldsToSerialize() noexcept {
    serialized_ = fields();
    collection_ = {static_cast<std::int32_t>(serialized_.size()), serialized_.data()};
    return &collection_;
}

}  // namespace reroute::trt
