// libreroute_onnxruntime.so: operators for ONNX Runtime on the CPU. Work is divided among the session's own threads.
//
//   reroute.cpu    what `reroute build --kernels` puts into a bundle: all of them
//   reroute        the three routing ops, so that a graph in plugin form, which TensorRT's plugins run, runs here too
#include <mutex>

#include "kernel.h"

namespace {

using namespace reroute::ort;

// A domain of the process: all its sessions refer to it.
template <std::size_t Count>
Error* make_domain(const Api* api, const char* name, const CustomOp (&ops)[Count], Domain** domain) {
    if (Error* error = CreateCustomOpDomain::call(api, name, domain)) return error;
    for (const CustomOp& one : ops) {
        if (Error* error = CustomOpDomainAdd::call(api, *domain, &one)) return error;
    }
    return nullptr;
}

}  // namespace

extern "C" {

// ONNX Runtime calls this when a session is given the library.
__attribute__((visibility("default"))) Error* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
    static const CustomOp all[] = {linear_op(),    linears_op(), mlp_op(),    rest_of_layer_op(),
                                   attention_op(), select_op(),  gather_op(), scatter_op()};
    static const CustomOp plugins[] = {select_op(), gather_op(), scatter_op()};
    static std::mutex mutex;
    static Domain *cpu = nullptr, *neutral = nullptr;
    const Api* api = base->get_api(kApiVersion);
    if (api == nullptr) return nullptr;  // an older one: it will not know the operators, and say so
    const std::lock_guard<std::mutex> lock(mutex);
    if (neutral == nullptr) {
        Domain *made = nullptr, *other = nullptr;
        if (Error* error = make_domain(api, "reroute.cpu", all, &made)) return error;
        if (Error* error = make_domain(api, "reroute", plugins, &other)) return error;
        cpu = made;
        neutral = other;
    }
    if (Error* error = AddCustomOpDomain::call(api, options, cpu)) return error;
    return AddCustomOpDomain::call(api, options, neutral);
}

// For `reroute build`, which refuses a processor that has only the portable forms.
__attribute__((visibility("default"))) const char* reroute_cpu_instructions() { return reroute::cpu_instructions(); }
}
