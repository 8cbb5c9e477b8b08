// The built plugin library through TensorRT's own interfaces, as TensorRT would call it while building: creators,
// fields, clone, types, formats, shape expressions, limits, messages and the serialisation round trip.
#include <algorithm>

#include "plugin_harness.h"
#include "reroute/select.h"

namespace {

using namespace harness;
using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::TensorRTPhase;

void test_fields() {
    check::context = "fields";
    const auto* names = creators.at("RerouteSelect")->getFieldNames();
    CHECK(names->nbFields == 4);
    CHECK(std::strcmp(names->fields[0].name, "keep") == 0 && std::strcmp(names->fields[3].name, "scale") == 0);
    CHECK(creators.at("RerouteGather")->getFieldNames()->nbFields == 0);

    const auto refused = [](const std::vector<PluginField>& fields, const char* why) {
        logger.last.clear();
        const bool none = make("RerouteSelect", fields) == nullptr;
        return none && logger.last.find(why) != std::string::npos;
    };
    Attributes a;
    auto fields = a.fields();
    fields.pop_back();
    CHECK(refused(fields, "needs the attributes keep, num_heads, num_kv_heads"));
    fields = a.fields();
    fields[0].type = PluginFieldType::kFLOAT32;
    CHECK(refused(fields, "needs the attributes"));
    a.num_kv_heads = 3;
    CHECK(refused(a.fields(), "num_kv_heads = 3 must divide num_heads = 8"));
    a = {};
    a.keep = -1;
    CHECK(refused(a.fields(), "keep = -1"));

    const std::int64_t wide_keep = 7;
    const double wide_scale = 0.5;
    a = {};
    fields = a.fields();
    fields[0] = {"keep", &wide_keep, PluginFieldType::kINT64, 1};
    fields[3] = {"scale", &wide_scale, PluginFieldType::kFLOAT64, 1};
    CHECK(make("RerouteSelect", fields) != nullptr);
}

// What an engine stores is enough to make the same plugin again.
void test_serialisation() {
    check::context = "serialisation";
    const Attributes a;
    const Plugin plugin = make("RerouteSelect", a.fields());
    const PluginFieldCollection* stored = runtime(plugin).getFieldsToSerialize();
    CHECK(stored->nbFields == 4);
    const Plugin again(creators.at("RerouteSelect")->createPlugin("layer", stored, TensorRTPhase::kRUNTIME));
    const Plugin clone(plugin->clone());
    for (const Plugin* copy : {&again, &clone}) {
        const PluginFieldCollection* fields = runtime(*copy).getFieldsToSerialize();
        CHECK(fields->nbFields == 4);
        for (std::int32_t i = 0; i < 4; ++i) {
            CHECK(std::strcmp(fields->fields[i].name, stored->fields[i].name) == 0);
            CHECK(std::memcmp(fields->fields[i].data, stored->fields[i].data, 4) == 0);
            CHECK(fields->fields[i].data != stored->fields[i].data);
        }
    }
    CHECK(runtime(make("RerouteScatter")).getFieldsToSerialize()->nbFields == 0);
    const Plugin attached(runtime(plugin).attachToContext(nullptr));
    CHECK(attached != nullptr && attached.get() != plugin.get());
    CHECK(std::strcmp(core(attached).getPluginName(), "RerouteSelect") == 0);
}

void test_types_and_formats() {
    check::context = "types and formats";
    const Plugin select = make("RerouteSelect", Attributes{}.fields());
    for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        std::vector<DynamicPluginTensorDesc> tensors = {fake::dynamic(fake::tensor(type, {1, 8})),
                                                        fake::dynamic(fake::tensor(type, {1, 9, 2})),
                                                        fake::dynamic(fake::tensor(DataType::kINT64, {1, 5})),
                                                        fake::dynamic(fake::tensor(DataType::kINT64, {1, 4})),
                                                        fake::dynamic(fake::tensor(DataType::kINT64, {1, 9}))};
        for (std::int32_t i = 0; i < 5; ++i) CHECK(build(select).supportsFormatCombination(i, tensors.data(), 4, 1));
        tensors[1].desc.type = type == DataType::kHALF ? DataType::kFLOAT : DataType::kHALF;
        CHECK(!build(select).supportsFormatCombination(1, tensors.data(), 4, 1));
        tensors[2].desc.type = DataType::kINT32;
        CHECK(!build(select).supportsFormatCombination(2, tensors.data(), 4, 1));
        tensors[0].desc.format = nvinfer1::PluginFormat::kCHW32;
        CHECK(!build(select).supportsFormatCombination(0, tensors.data(), 4, 1));
        DataType out{};
        const DataType in[] = {type, type, DataType::kINT64, DataType::kINT64};
        CHECK(build(select).getOutputDataTypes(&out, 1, in, 4) == 0 && out == DataType::kINT64);
        const DataType gather_in[] = {type, DataType::kINT64, type};
        CHECK(build(make("RerouteGather")).getOutputDataTypes(&out, 1, gather_in, 2) == 0 && out == type);
        CHECK(build(make("RerouteScatter")).getOutputDataTypes(&out, 1, gather_in, 3) == 0 && out == type);
        CHECK(build(select).getOutputDataTypes(&out, 1, in, 3) != 0);
    }
    auto wrong = fake::dynamic(fake::tensor(DataType::kINT8, {1, 8}));
    CHECK(!build(select).supportsFormatCombination(0, &wrong, 4, 1));
}

void test_shapes() {
    check::context = "shape expressions";
    const Plugin select = make("RerouteSelect", Attributes{}.fields());
    for (const std::int64_t n : {0, 1, 63, 64, 65, 576}) {
        fake::Builder builder;
        nvinfer1::DimsExprs in[] = {builder.shape({2, 32}), builder.shape({2, n + 5, 8}), builder.shape({2, n}),
                                    builder.shape({2, 5})};
        nvinfer1::DimsExprs out{};
        CHECK(build(select).getOutputShapes(in, 4, nullptr, 0, &out, 1, builder) == 0);
        CHECK(out.nbDims == 2 && builder.value(out.d[0]) == 2);
        CHECK(builder.value(out.d[1]) == 5 + std::min<std::int64_t>(64, n));
    }
    fake::Builder builder;
    nvinfer1::DimsExprs in[] = {builder.shape({2, 640, 96}), builder.shape({2, 128}), builder.shape({2, 128, 96})};
    nvinfer1::DimsExprs out{};
    CHECK(build(make("RerouteGather")).getOutputShapes(in, 2, nullptr, 0, &out, 1, builder) == 0);
    CHECK(out.nbDims == 3 && builder.value(out.d[1]) == 128 && builder.value(out.d[2]) == 96);
    CHECK(build(make("RerouteScatter")).getOutputShapes(in, 3, nullptr, 0, &out, 1, builder) == 0);
    CHECK(out.nbDims == 3 && builder.value(out.d[1]) == 640);
    in[1] = builder.shape({128});
    logger.last.clear();
    CHECK(build(make("RerouteGather")).getOutputShapes(in, 2, nullptr, 0, &out, 1, builder) != 0);
    CHECK(logger.last == "RerouteGather: input 1 has rank 1; it must have rank 2");
    CHECK(build(select).getNbOutputs() == 1);
}

void test_limits() {
    check::context = "limits and messages";
    const Plugin select = make("RerouteSelect", Attributes{}.fields());
    const auto configure = [&](const std::vector<PluginTensorDesc>& tensors) {
        std::vector<DynamicPluginTensorDesc> in;
        for (const auto& desc : tensors) in.push_back(fake::dynamic(desc));
        const auto out = fake::dynamic(fake::tensor(DataType::kINT64, {1, 69}));
        return build(select).configurePlugin(in.data(), static_cast<std::int32_t>(in.size()), &out, 1);
    };
    CHECK(configure(select_call(581, 576, 5)) == 0);
    CHECK(configure(select_call(600, 576, 512)) == 0);  // bounds that do not occur together
    CHECK(configure(select_call(9000, 8193, 5)) != 0);
    CHECK(logger.last.find("candidates [1, 8193]") != std::string::npos);
    CHECK(logger.last.find("65536 rows and 8192 candidates") != std::string::npos);
    CHECK(configure({}) != 0);

    const auto change = [&](const std::vector<PluginTensorDesc>& in) {
        const auto out = fake::tensor(DataType::kINT64, {1, 69});
        return runtime(select).onShapeChange(in.data(), static_cast<std::int32_t>(in.size()), &out, 1);
    };
    CHECK(change(select_call(581, 576, 5)) == 0);
    CHECK(change(select_call(1, 0, 1)) == 0);  // decode
    CHECK(change(select_call(600, 576, 512)) != 0);
    auto wrong = select_call(581, 576, 5);
    wrong[1] = fake::tensor(DataType::kFLOAT, {1, 581, 9});
    CHECK(change(wrong) != 0);
    CHECK(logger.last.find("keys [1, 581, 9] do not fit num_heads = 8 and num_kv_heads = 2") != std::string::npos);

    const std::vector<PluginTensorDesc> scatter = {fake::tensor(DataType::kHALF, {1, 640, 96}),
                                                   fake::tensor(DataType::kINT64, {1, 128}),
                                                   fake::tensor(DataType::kHALF, {1, 127, 96})};
    CHECK(runtime(make("RerouteScatter")).onShapeChange(scatter.data(), 3, scatter.data(), 1) != 0);
    CHECK(logger.last.find("rows [1, 127, 96] do not fit slots [1, 128]") != std::string::npos);

    std::vector<DynamicPluginTensorDesc> in;
    for (const auto& desc : select_call(581, 576, 5)) in.push_back(fake::dynamic(desc));
    reroute::SelectShape shape{1, 581, 576, 5, 8, 2, 4, 64, 0.125F, reroute::DType::kFloat32};
    CHECK(build(select).getWorkspaceSize(in.data(), 4, nullptr, 0) == reroute::select_workspace_bytes(shape));
}

}  // namespace

int main(int argc, char** argv) {
    return run(argc, argv, "plugin_test", [] {
        test_fields();
        test_serialisation();
        test_types_and_formats();
        test_shapes();
        test_limits();
    });
}
