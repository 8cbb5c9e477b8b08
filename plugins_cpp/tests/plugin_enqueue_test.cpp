// enqueue of the three plugins with host memory, which is device memory to the library over the emulated kernels:
// select, gather by its slots, scatter back.
#include <algorithm>

#include "plugin_harness.h"
#include "reroute/select.h"

namespace {

using namespace harness;
using nvinfer1::DataType;

void test_enqueue() {
    check::context = "enqueue";
    constexpr std::int64_t kS = 20, kN = 15, kT = 5, kK = 4, kA = kT + kK, kE = 24;
    const Attributes a{static_cast<std::int32_t>(kK), 8, 2, 0.5F};
    std::vector<float> q(32), keys(kS * 8), full(kS * kE);
    for (std::size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(i % 7) - 3.0F;
    for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<float>(i * 37 % 11) * 0.25F;
    for (std::size_t i = 0; i < full.size(); ++i) full[i] = static_cast<float>(i);
    std::vector<std::int64_t> candidates, always, slots(kA), expected(kA);
    for (std::int64_t i = 0; i < kS; ++i) (i % 4 == 1 ? always : candidates).push_back(i);

    const Plugin select = make("RerouteSelect", a.fields());
    auto in_desc = select_call(kS, kN, kT);
    const auto out_desc = fake::tensor(DataType::kINT64, {1, kA});
    const reroute::SelectShape shape{1, kS, kN, kT, 8, 2, 4, kK, 0.5F, reroute::DType::kFloat32};
    std::vector<unsigned char> workspace(reroute::select_workspace_bytes(shape) + 256);
    void* aligned = workspace.data();
    std::size_t space = workspace.size();
    std::align(256, 1, aligned, space);
    const void* in[] = {q.data(), keys.data(), candidates.data(), always.data()};
    void* out[] = {slots.data()};
    CHECK(runtime(select).enqueue(in_desc.data(), &out_desc, in, out, aligned, nullptr) == 0);
    CHECK(select_cpu(shape, {q.data(), keys.data(), candidates.data(), always.data()}, expected.data()) ==
          reroute::Status::kOk);
    CHECK(slots == expected);

    std::vector<float> rows(kA * kE), updated(full.size());
    PluginTensorDesc desc[] = {fake::tensor(DataType::kFLOAT, {1, kS, kE}), fake::tensor(DataType::kINT64, {1, kA}),
                               fake::tensor(DataType::kFLOAT, {1, kA, kE})};
    const void* gather_in[] = {full.data(), slots.data()};
    void* gather_out[] = {rows.data()};
    CHECK(runtime(make("RerouteGather")).enqueue(desc, &desc[2], gather_in, gather_out, nullptr, nullptr) == 0);
    CHECK(rows[0] == full[static_cast<std::size_t>(slots[0] * kE)]);
    for (float& value : rows) value = -value;
    const void* scatter_in[] = {full.data(), slots.data(), rows.data()};
    void* scatter_out[] = {updated.data()};
    CHECK(runtime(make("RerouteScatter")).enqueue(desc, &desc[0], scatter_in, scatter_out, nullptr, nullptr) == 0);
    for (std::int64_t s = 0; s < kS; ++s) {
        const bool ran = std::find(slots.begin(), slots.end(), s) != slots.end();
        const auto i = static_cast<std::size_t>(s * kE + 1);
        CHECK(updated[i] == (ran ? -full[i] : full[i]));
    }
    logger.last.clear();
    CHECK(runtime(select).enqueue(in_desc.data(), &out_desc, in, out, nullptr, nullptr) != 0);
    CHECK(logger.last.find("RerouteSelect: a tensor that is not empty has no address, [1, 32]") == 0);
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, "plugin_enqueue_test", test_enqueue); }
