// The three creators, and the two C symbols by which TensorRT finds them in a library (IPluginRegistry::loadLibrary,
// trtexec --dynamicPlugins, version-compatible plans). Nothing registers itself: a creator that is both registered
// and exported makes loadLibrary fail.
#include <NvInferRuntime.h>

#include <cmath>
#include <cstring>
#include <exception>
#include <limits>

#include "log.h"
#include "rows_plugins.h"
#include "select_plugin.h"

namespace reroute::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

const PluginField* find(const PluginFieldCollection* fields, const char* name) {
    for (std::int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
        const PluginField& field = fields->fields[i];
        if (field.name != nullptr && std::strcmp(field.name, name) == 0 && field.data != nullptr) return &field;
    }
    return nullptr;
}

// The ONNX parser gives int32 and float32; hand-made networks may give the wide types.
bool read(const PluginFieldCollection* fields, const char* name, std::int32_t& value) {
    const PluginField* field = find(fields, name);
    if (field == nullptr) return false;
    if (field->type == PluginFieldType::kINT32) {
        std::memcpy(&value, field->data, sizeof value);
        return true;
    }
    if (field->type != PluginFieldType::kINT64) return false;
    std::int64_t wide;
    std::memcpy(&wide, field->data, sizeof wide);
    value = static_cast<std::int32_t>(wide);
    return wide >= 0 && wide <= std::numeric_limits<std::int32_t>::max();
}

bool read(const PluginFieldCollection* fields, const char* name, float& value) {
    const PluginField* field = find(fields, name);
    if (field == nullptr) return false;
    if (field->type == PluginFieldType::kFLOAT32) {
        std::memcpy(&value, field->data, sizeof value);
        return true;
    }
    if (field->type != PluginFieldType::kFLOAT64) return false;
    double wide;
    std::memcpy(&wide, field->data, sizeof wide);
    value = static_cast<float>(wide);
    return true;
}

RoutingPlugin* make_select(const PluginFieldCollection* fields) {
    SelectAttributes attributes;
    const bool complete = read(fields, "keep", attributes.keep) && read(fields, "num_heads", attributes.num_heads) &&
                          read(fields, "num_kv_heads", attributes.num_kv_heads) &&
                          read(fields, "scale", attributes.scale);
    if (!complete) {
        log_error("RerouteSelect needs the attributes keep, num_heads, num_kv_heads (int) and scale (float)");
        return nullptr;
    }
    const bool valid = attributes.keep >= 0 && attributes.num_kv_heads >= 1 &&
                       attributes.num_heads >= attributes.num_kv_heads &&
                       attributes.num_heads % attributes.num_kv_heads == 0 && std::isfinite(attributes.scale);
    if (!valid) {
        log_error("RerouteSelect: keep = " + std::to_string(attributes.keep) +
                  " must not be negative, num_kv_heads = " + std::to_string(attributes.num_kv_heads) +
                  " must divide num_heads = " + std::to_string(attributes.num_heads) +
                  ", and scale = " + std::to_string(attributes.scale) + " must be finite");
        return nullptr;
    }
    return new SelectPlugin(attributes);
}

RoutingPlugin* make_gather(const PluginFieldCollection*) { return new GatherPlugin(); }
RoutingPlugin* make_scatter(const PluginFieldCollection*) { return new ScatterPlugin(); }

class Creator final : public nvinfer1::IPluginCreatorV3One {
  public:
    using Make = RoutingPlugin* (*)(const PluginFieldCollection*);

    Creator(const char* name, Make make, std::vector<PluginField> fields)
        : name_(name),
          make_(make),
          fields_(std::move(fields)),
          collection_{static_cast<std::int32_t>(fields_.size()), fields_.data()} {}

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const*, PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase) noexcept override {
        try {
            return make_(fields);
        } catch (const std::exception& error) {
            log_error(std::string(name_) + " cannot be made: " + error.what());
            return nullptr;
        }
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return name_; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  private:
    const char* name_;
    Make make_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_;
};

std::vector<PluginField> select_fields() {
    return {{"keep", nullptr, PluginFieldType::kINT32, 1},
            {"num_heads", nullptr, PluginFieldType::kINT32, 1},
            {"num_kv_heads", nullptr, PluginFieldType::kINT32, 1},
            {"scale", nullptr, PluginFieldType::kFLOAT32, 1}};
}

}  // namespace
}  // namespace reroute::trt

#define REROUTE_EXPORT extern "C" __attribute__((visibility("default")))

REROUTE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { reroute::trt::set_logger_finder(finder); }

REROUTE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    using namespace reroute::trt;
    static Creator select("RerouteSelect", make_select, select_fields());
    static Creator gather("RerouteGather", make_gather, {});
    static Creator scatter("RerouteScatter", make_scatter, {});
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&select, &gather, &scatter};
    count = 3;
    return creators;
}
