// The plugin library loads without TensorRT and without a GPU, and shows TensorRT's two entry points and nothing else.
// This program knows no TensorRT header and links none of its libraries.
#include <dlfcn.h>

#include "check.h"

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "error: give the plugin library\n");
        return 2;
    }
    check::context = argv[1];
    // RTLD_NOW: every symbol must be found, so none of libnvinfer is needed.
    void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!CHECK(library != nullptr)) {
        std::fprintf(stderr, "%s\n", dlerror());
        return check::finish("loader_test");
    }
    CHECK(dlsym(library, "getCreators") != nullptr);
    CHECK(dlsym(library, "setLoggerFinder") != nullptr);
    // The static CUDA runtime stays inside.
    CHECK(dlsym(library, "cudaLaunchKernel") == nullptr);
    // No TensorRT came along.
    CHECK(dlsym(RTLD_DEFAULT, "createInferRuntime_INTERNAL") == nullptr);
    CHECK(dlclose(library) == 0);
    return check::finish("loader_test");
}
