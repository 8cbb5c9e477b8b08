// libreroute_onnxruntime.so: operators for ONNX Runtime on the CPU, domain "reroute.cpu". Work is divided among the
// session's own threads.
#include <mutex>

#include "kernel.h"

extern "C" {

// ONNX Runtime calls this when a session is given the library.
__attribute__((visibility("default"))) reroute::ort::Error* RegisterCustomOps(reroute::ort::SessionOptions* options,
                                                                              const reroute::ort::ApiBase* base) {
    using namespace reroute::ort;
    static const CustomOp ops[] = {linear_op(), linears_op(), mlp_op(), rest_of_layer_op(), attention_op()};
    static std::mutex mutex;
    static Domain* domain = nullptr;  // of the process: all its sessions refer to it
    const Api* api = base->get_api(kApiVersion);
    if (api == nullptr) return nullptr;  // an older one: it will not know the operators, and say so
    const std::lock_guard<std::mutex> lock(mutex);
    if (domain == nullptr) {
        Domain* made = nullptr;
        if (auto* error = CreateCustomOpDomain::call(api, "reroute.cpu", &made)) return error;
        for (const CustomOp& one : ops) {
            if (auto* error = CustomOpDomainAdd::call(api, made, &one)) return error;
        }
        domain = made;
    }
    return AddCustomOpDomain::call(api, options, domain);
}

// For `reroute build`, which refuses a processor that has only the portable forms.
__attribute__((visibility("default"))) const char* reroute_cpu_instructions() { return reroute::cpu_instructions(); }
}
