# Lists what is in the binaries, in the CycloneDX format: llama.cpp, ggml with it, and the sources that llama.cpp vendors. What is
# vendored has no version of its own that could be trusted, so its files are listed with their SHA-256.

set(SBOM ${CMAKE_BINARY_DIR}/sbom.cdx.json)

set(vendored)
file(GLOB folders RELATIVE ${LLAMA_CPP_DIR}/vendor ${LLAMA_CPP_DIR}/vendor/*)
foreach (folder ${folders})
    set(inner)
    file(GLOB_RECURSE sources RELATIVE ${LLAMA_CPP_DIR}
        ${LLAMA_CPP_DIR}/vendor/${folder}/*.h ${LLAMA_CPP_DIR}/vendor/${folder}/*.hpp ${LLAMA_CPP_DIR}/vendor/${folder}/*.c
        ${LLAMA_CPP_DIR}/vendor/${folder}/*.cpp)
    foreach (source ${sources})
        file(SHA256 ${LLAMA_CPP_DIR}/${source} hash)
        list(APPEND inner "{\"type\": \"file\", \"name\": \"${source}\", \"hashes\": [{\"alg\": \"SHA-256\", \"content\": \"${hash}\"}]}")
    endforeach()
    if (inner)
        list(JOIN inner ", " inner)
        list(APPEND vendored "{\"type\": \"library\", \"name\": \"${folder}\", \"components\": [${inner}]}")
    endif()
endforeach()
list(JOIN vendored ", " vendored)

set(origin)
if (NOT LLAMA_CPP_SOURCE_DIR)
    set(origin ", \"hashes\": [{\"alg\": \"SHA-256\", \"content\": \"${LLAMA_CPP_PYTHON_SHA256}\"}], \"purl\": \"pkg:pypi/llama-cpp-python@${LLAMA_CPP_PYTHON_VERSION}\"")
endif()
file(WRITE ${SBOM} "{\"bomFormat\": \"CycloneDX\", \"specVersion\": \"1.5\", \"version\": 1, \"components\": [\
{\"type\": \"library\", \"name\": \"llama.cpp\", \"version\": \"${commit}\"${origin}, \"components\": [${vendored}]}]}\n")
