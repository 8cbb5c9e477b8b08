# Cross-compiling for a Jetson: the host's aarch64 compiler, and a toolkit with the `aarch64-linux` or `sbsa-linux` target.
# On the device itself use the native preset instead.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
find_program(REROUTE_CROSS_COMPILER aarch64-linux-gnu-g++)
if(NOT REROUTE_CROSS_COMPILER)
    message(FATAL_ERROR "aarch64-linux-gnu-g++ is not on PATH.\n"
        "Install it (Debian, Ubuntu: g++-aarch64-linux-gnu), or build on the Jetson with the preset orin-native.")
endif()
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
