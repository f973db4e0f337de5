# Included by ggml in builds with ThreadSanitizer (scripts/setup.sh), which would spend nearly all of its time in ggml's arithmetic.
# What shares work among threads, ggml-cpu.c, stays instrumented, as do all of llama.cpp and of ours. Needs CMake 3.19.

function(leave_kernels_plain)
    file(GLOB_RECURSE kernels ${CMAKE_CURRENT_SOURCE_DIR}/src/ggml-cpu/*.c ${CMAKE_CURRENT_SOURCE_DIR}/src/ggml-cpu/*.cpp)
    list(FILTER kernels EXCLUDE REGEX "/ggml-cpu\\.c(pp)?$")
    set_property(SOURCE ${kernels} TARGET_DIRECTORY ggml-cpu APPEND PROPERTY COMPILE_OPTIONS -fno-sanitize=thread -O3)
    set_property(SOURCE ${CMAKE_CURRENT_SOURCE_DIR}/src/ggml-quants.c TARGET_DIRECTORY ggml-base
        APPEND PROPERTY COMPILE_OPTIONS -fno-sanitize=thread -O3)
endfunction()

cmake_language(DEFER CALL leave_kernels_plain)  # its targets do not exist yet
