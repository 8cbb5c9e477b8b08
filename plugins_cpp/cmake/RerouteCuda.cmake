# Decides REROUTE_HAS_CUDA, and says what to do when CUDA was asked for and is not there.
include(CheckLanguage)

if(NOT REROUTE_CUDA MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "REROUTE_CUDA is '${REROUTE_CUDA}'; it must be AUTO, ON or OFF")
endif()

set(REROUTE_HAS_CUDA OFF)
if(REROUTE_CUDA STREQUAL "OFF")
    set(REROUTE_NO_CUDA_REASON "REROUTE_CUDA=OFF")
else()
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
        if(NOT CMAKE_CUDA_ARCHITECTURES)
            # Turing, Ampere, Orin, Ada, Hopper; newer GPUs run the PTX of the last.
            set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 87-real 89-real 90)
        endif()
        enable_language(CUDA)
        find_package(CUDAToolkit REQUIRED)
        if(CUDAToolkit_VERSION VERSION_LESS 12.0)
            message(FATAL_ERROR "CUDA ${CUDAToolkit_VERSION} is too old; 12.0 or later is needed (12.6 and 13.0 are in use)")
        endif()
        set(CMAKE_CUDA_STANDARD 17)
        set(CMAKE_CUDA_STANDARD_REQUIRED ON)
        set(REROUTE_HAS_CUDA ON)
    else()
        set(REROUTE_NO_CUDA_REASON "no nvcc found")
    endif()
endif()

if(REROUTE_CUDA STREQUAL "ON" AND NOT REROUTE_HAS_CUDA)
    message(FATAL_ERROR "REROUTE_CUDA=ON, but no CUDA compiler works here.\n"
        "Put nvcc on PATH, or set CUDACXX or -DCMAKE_CUDA_COMPILER=.../bin/nvcc; "
        "-DREROUTE_CUDA=OFF builds the CPU reference alone.")
endif()

if(TRT_INCLUDE_DIR)
    if(NOT EXISTS "${TRT_INCLUDE_DIR}/NvInferRuntime.h")
        message(FATAL_ERROR "TRT_INCLUDE_DIR=${TRT_INCLUDE_DIR} has no NvInferRuntime.h.\n"
            "Give the folder of TensorRT's headers, or `include/` of a release of github.com/NVIDIA/TensorRT.")
    endif()
    if(NOT REROUTE_HAS_CUDA)
        message(FATAL_ERROR "The TensorRT adapters need CUDA (${REROUTE_NO_CUDA_REASON}): their headers include cuda_runtime_api.h.\n"
            "Install the toolkit, or leave TRT_INCLUDE_DIR unset to build the CPU reference alone.")
    endif()
endif()
