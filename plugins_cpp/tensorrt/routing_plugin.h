// What the three plugins have in common. Adapters only check, dispatch and call: the work is in reroute/*.h.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "reroute/status.h"

namespace reroute::trt {

// The creator looks plugins up by name, version and namespace; these are the defaults of TensorRT's ONNX parser.
constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "";

// An op's tensors, inputs first, then the one output.
struct TensorRule {
    bool slots;  // int64; otherwise a float type, the same for all such tensors of the op
    std::int32_t rank;
};

class RoutingPlugin : public nvinfer1::IPluginV3,
                      public nvinfer1::IPluginV3OneCore,
                      public nvinfer1::IPluginV3OneBuild,
                      public nvinfer1::IPluginV3OneRuntime {
  public:
    ~RoutingPlugin() override = default;

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return name_; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    std::int32_t getNbOutputs() const noexcept override { return 1; }
    std::int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t in_count,
                                 nvinfer1::DynamicPluginTensorDesc const* out,
                                 std::int32_t out_count) noexcept override;
    std::int32_t getOutputDataTypes(nvinfer1::DataType* out, std::int32_t out_count, nvinfer1::DataType const* in,
                                    std::int32_t in_count) const noexcept override;
    std::int32_t getOutputShapes(nvinfer1::DimsExprs const* in, std::int32_t in_count, nvinfer1::DimsExprs const*,
                                 std::int32_t, nvinfer1::DimsExprs* out, std::int32_t out_count,
                                 nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(std::int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                   std::int32_t in_count, std::int32_t out_count) noexcept override;

    std::int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, std::int32_t in_count,
                               nvinfer1::PluginTensorDesc const* out, std::int32_t out_count) noexcept override;
    std::int32_t enqueue(nvinfer1::PluginTensorDesc const* in_desc, nvinfer1::PluginTensorDesc const* out_desc,
                         void const* const* in, void* const* out, void* workspace,
                         cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

  protected:
    RoutingPlugin(const char* name, std::vector<TensorRule> rules) : name_(name), rules_(std::move(rules)) {}

    // One call of the op: dimensions of the inputs and the type of the float tensors. Made in enqueue, so no heap.
    struct Call {
        std::array<nvinfer1::Dims, 4> dims;
        std::int32_t count;
        nvinfer1::DataType type;
    };

    virtual RoutingPlugin* copy() const = 0;
    virtual nvinfer1::DimsExprs output_shape(nvinfer1::DimsExprs const* in, nvinfer1::IExprBuilder& builder) const = 0;
    // Empty if the op takes such a call; otherwise what is wrong, with the numbers. `bounds`: the dimensions are upper
    // bounds, each by itself, so only limits can be checked between them.
    virtual std::string problem(const Call& call, bool bounds) const = 0;
    virtual Status run(const Call& call, void const* const* in, void* out, void* workspace,
                       cudaStream_t stream) const = 0;
    virtual std::vector<nvinfer1::PluginField> fields() const { return {}; }

    std::int32_t inputs() const { return static_cast<std::int32_t>(rules_.size()) - 1; }

    // From any array of descriptors; `dims_of` picks the dimensions of one.
    template <typename Desc, typename DimsOf>
    Call call_of(const Desc* in, nvinfer1::DataType type, DimsOf dims_of) const {
        Call call{{}, inputs(), type};
        for (std::int32_t i = 0; i < call.count; ++i) call.dims[static_cast<std::size_t>(i)] = dims_of(in[i]);
        return call;
    }
    Call largest_call(nvinfer1::DynamicPluginTensorDesc const* in) const {
        return call_of(in, in[0].desc.type, [](const auto& tensor) { return tensor.max; });
    }

  private:
    Call actual_call(nvinfer1::PluginTensorDesc const* in) const {
        return call_of(in, in[0].type, [](const auto& tensor) { return tensor.dims; });
    }
    std::string rank_problem(const Call& call) const;
    // 0, or -1 with the message logged: what TensorRT expects.
    std::int32_t answer(const std::string& problem) const noexcept;

    const char* name_;
    std::vector<TensorRule> rules_;
    std::vector<nvinfer1::PluginField> serialized_;
    nvinfer1::PluginFieldCollection collection_{};
};

// "[1, 576]", for messages.
std::string text_of(const nvinfer1::Dims& dims);

}  // namespace reroute::trt
