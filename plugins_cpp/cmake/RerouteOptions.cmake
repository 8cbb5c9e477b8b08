# The interface target `reroute_options`: warnings and sanitizers, for our sources only.
add_library(reroute_options INTERFACE)

set(host_warnings -Wall -Wextra -Wshadow -Wnon-virtual-dtor)
if(REROUTE_WERROR)
    list(APPEND host_warnings -Werror)
endif()
target_compile_options(reroute_options INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:${host_warnings};-Wpedantic;-Wconversion>")

# nvcc writes intermediate sources that are not pedantic; the emulator compiles the same kernels with all of the above.
if(REROUTE_HAS_CUDA)
    string(REPLACE ";" "," joined "${host_warnings}")
    target_compile_options(reroute_options INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${joined}>")
    if(REROUTE_WERROR)
        target_compile_options(reroute_options INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings>")
    endif()
endif()

if(REROUTE_SANITIZE)
    set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_compile_options(reroute_options INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${sanitizers}>")
    target_link_options(reroute_options INTERFACE -fsanitize=address,undefined)
endif()
