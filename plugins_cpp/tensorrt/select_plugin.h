#pragma once

#include "reroute/select.h"
#include "routing_plugin.h"

namespace reroute::trt {

// The ONNX attributes. 32-bit, because that is what the parser makes of an INT attribute.
struct SelectAttributes {
    std::int32_t keep = 0;
    std::int32_t num_heads = 0;
    std::int32_t num_kv_heads = 0;
    float scale = 0.0F;
};

// RerouteSelect(q_last [B, H*d], keys [B, S, G*d], candidates i64 [B, N], always i64 [B, T])
//     -> i64 [B, T + min(keep, N)]
class SelectPlugin final : public RoutingPlugin {
  public:
    explicit SelectPlugin(const SelectAttributes& attributes);

    std::size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t in_count,
                                 nvinfer1::DynamicPluginTensorDesc const*, std::int32_t) const noexcept override;

  protected:
    RoutingPlugin* copy() const override { return new SelectPlugin(attributes_); }
    nvinfer1::DimsExprs output_shape(nvinfer1::DimsExprs const* in, nvinfer1::IExprBuilder& builder) const override;
    std::string problem(const Call& call, bool bounds) const override;
    Status run(const Call& call, void const* const* in, void* out, void* workspace, cudaStream_t stream) const override;
    std::vector<nvinfer1::PluginField> fields() const override;

  private:
    SelectShape shape_of(const Call& call, bool bounds) const;

    SelectAttributes attributes_;
};

}  // namespace reroute::trt
