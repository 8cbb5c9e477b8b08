#pragma once

#include "reroute/rows.h"
#include "routing_plugin.h"

namespace reroute::trt {

// RerouteGather(x [B, S, E], slots i64 [B, A]) -> [B, A, E]
class GatherPlugin final : public RoutingPlugin {
  public:
    GatherPlugin();

  protected:
    RoutingPlugin* copy() const override { return new GatherPlugin(); }
    nvinfer1::DimsExprs output_shape(nvinfer1::DimsExprs const* in, nvinfer1::IExprBuilder& builder) const override;
    std::string problem(const Call& call, bool bounds) const override;
    Status run(const Call& call, void const* const* in, void* out, void* workspace, cudaStream_t stream) const override;
};

// RerouteScatter(full [B, S, E], slots i64 [B, A], rows [B, A, E]) -> [B, S, E]. The output is a tensor of its own: an
// alias of `full` is what TensorRT's documentation offers, and what makes it keep a second copy.
class ScatterPlugin final : public RoutingPlugin {
  public:
    ScatterPlugin();

  protected:
    RoutingPlugin* copy() const override { return new ScatterPlugin(); }
    nvinfer1::DimsExprs output_shape(nvinfer1::DimsExprs const* in, nvinfer1::IExprBuilder& builder) const override;
    std::string problem(const Call& call, bool bounds) const override;
    Status run(const Call& call, void const* const* in, void* out, void* workspace, cudaStream_t stream) const override;
};

}  // namespace reroute::trt
