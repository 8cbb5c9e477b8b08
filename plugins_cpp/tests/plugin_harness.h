// Loads a plugin library as TensorRT would, and makes plugins and calls for its tests.
#pragma once

#include <dlfcn.h>

#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "fake_tensorrt.h"

namespace harness {

using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

using Plugin = std::unique_ptr<IPluginV3>;

inline std::map<std::string, nvinfer1::IPluginCreatorV3One*> creators;
inline fake::Logger logger;

template <typename Capability>
Capability& as(const Plugin& plugin, PluginCapabilityType type) {
    return *static_cast<Capability*>(plugin->getCapabilityInterface(type));
}
inline nvinfer1::IPluginV3OneCore& core(const Plugin& p) {
    return as<nvinfer1::IPluginV3OneCore>(p, PluginCapabilityType::kCORE);
}
inline nvinfer1::IPluginV3OneBuild& build(const Plugin& p) {
    return as<nvinfer1::IPluginV3OneBuild>(p, PluginCapabilityType::kBUILD);
}
inline nvinfer1::IPluginV3OneRuntime& runtime(const Plugin& p) {
    return as<nvinfer1::IPluginV3OneRuntime>(p, PluginCapabilityType::kRUNTIME);
}

inline Plugin make(const char* op, const std::vector<PluginField>& fields = {}) {
    const PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
    return Plugin(creators.at(op)->createPlugin("layer", &collection, nvinfer1::TensorRTPhase::kBUILD));
}

// The attributes of RerouteSelect, as the fields that the ONNX parser makes of them.
struct Attributes {
    std::int32_t keep = 64;
    std::int32_t num_heads = 8;
    std::int32_t num_kv_heads = 2;
    float scale = 0.125F;

    std::vector<PluginField> fields() const {
        return {{"keep", &keep, PluginFieldType::kINT32, 1},
                {"num_heads", &num_heads, PluginFieldType::kINT32, 1},
                {"num_kv_heads", &num_kv_heads, PluginFieldType::kINT32, 1},
                {"scale", &scale, PluginFieldType::kFLOAT32, 1}};
    }
};

// Inputs of RerouteSelect with 8 heads of 4 over 2 key heads, batch 1.
inline std::vector<PluginTensorDesc> select_call(std::int64_t s, std::int64_t n, std::int64_t t) {
    return {fake::tensor(nvinfer1::DataType::kFLOAT, {1, 32}), fake::tensor(nvinfer1::DataType::kFLOAT, {1, s, 8}),
            fake::tensor(nvinfer1::DataType::kINT64, {1, n}), fake::tensor(nvinfer1::DataType::kINT64, {1, t})};
}

inline void load(const char* path) {
    check::context = "creators";
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(dlerror());
    using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(std::int32_t&);
    using SetLoggerFinder = void (*)(nvinfer1::ILoggerFinder*);
    reinterpret_cast<SetLoggerFinder>(dlsym(library, "setLoggerFinder"))(&logger);
    std::int32_t count = 0;
    auto* const* all = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(count);
    CHECK(count == 3);
    for (std::int32_t i = 0; i < count; ++i) {
        const auto info = all[i]->getInterfaceInfo();
        CHECK(std::strcmp(info.kind, "PLUGIN CREATOR_V3ONE") == 0);
        auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(all[i]);
        CHECK(std::strcmp(creator->getPluginVersion(), "1") == 0);
        CHECK(std::strcmp(creator->getPluginNamespace(), "") == 0);
        creators[creator->getPluginName()] = creator;
    }
    CHECK(creators.count("RerouteSelect") == 1 && creators.count("RerouteGather") == 1 &&
          creators.count("RerouteScatter") == 1);
}

// main() of a test of one library.
template <typename Tests>
int run(int argc, char** argv, const char* name, Tests tests) {
    if (argc != 2) {
        std::fprintf(stderr, "error: give the plugin library\n");
        return 2;
    }
    try {
        load(argv[1]);
        tests();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
    return check::finish(name);
}

}  // namespace harness
