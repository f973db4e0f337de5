# Obtains llama.cpp, copies it to ${LLAMA_CPP_DIR} and patches it there.
# Files are touched only when their content changes, so that editing a patch recompiles only what it changes.

set(LLAMA_CPP_PYTHON_VERSION 0.3.36)
set(LLAMA_CPP_PYTHON_SHA256  832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e)
set(LLAMA_CPP_COMMIT         0c1e57098)
set(LLAMA_H_SHA256           d5cf9203bea63b575e76cba4881f29cfd1b611451578b01582b75b72ecbb04bc)

if (DEFINED ENV{XDG_CACHE_HOME})
    set(cache_default $ENV{XDG_CACHE_HOME}/gguf-firstlayer)
elseif (CMAKE_HOST_WIN32)
    set(cache_default $ENV{LOCALAPPDATA}/gguf-firstlayer)
else()
    set(cache_default $ENV{HOME}/.cache/gguf-firstlayer)
endif()

set(LLAMA_CPP_SOURCE_DIR ""               CACHE PATH "a llama.cpp checkout to use instead of the pinned version; it is not modified")
set(FIRSTLAYER_CACHE_DIR ${cache_default} CACHE PATH "where downloads are kept")

set(LLAMA_CPP_DIR ${CMAKE_BINARY_DIR}/llama.cpp)
set(PATCH_DIR     ${CMAKE_SOURCE_DIR}/patches)

#
# sources
#

# llama-cpp-python's sdist vendors all of llama.cpp, so the library and the Python bindings are from the same commit
function(fetch_llama_cpp result)
    set(sdist    llama_cpp_python-${LLAMA_CPP_PYTHON_VERSION})
    set(unpacked ${FIRSTLAYER_CACHE_DIR}/${sdist})
    set(${result} ${unpacked}/vendor/llama.cpp PARENT_SCOPE)
    if (EXISTS ${unpacked})
        return()
    endif()
    file(MAKE_DIRECTORY ${FIRSTLAYER_CACHE_DIR})
    file(LOCK ${unpacked}.lock GUARD FUNCTION) # another build may fetch it at the same time
    if (EXISTS ${unpacked})
        return()
    endif()

    set(archive ${FIRSTLAYER_CACHE_DIR}/${sdist}.tar.gz)
    if (NOT EXISTS ${archive})
        message(STATUS "fetching llama-cpp-python ${LLAMA_CPP_PYTHON_VERSION}, for its copy of llama.cpp")
        find_package(Python3 3.10 COMPONENTS Interpreter REQUIRED)
        file(WRITE ${CMAKE_BINARY_DIR}/llama-cpp-python.txt
            "llama-cpp-python==${LLAMA_CPP_PYTHON_VERSION} --hash=sha256:${LLAMA_CPP_PYTHON_SHA256}\n")
        execute_process(
            COMMAND ${Python3_EXECUTABLE} -m pip download --quiet --no-deps --no-binary :all: --require-hashes
                    --dest ${FIRSTLAYER_CACHE_DIR} --requirement ${CMAKE_BINARY_DIR}/llama-cpp-python.txt
            RESULT_VARIABLE failed)
        if (failed)
            message(FATAL_ERROR "pip cannot download llama-cpp-python ${LLAMA_CPP_PYTHON_VERSION}; "
                                "give a llama.cpp checkout instead: -DLLAMA_CPP_SOURCE_DIR=DIR")
        endif()
    endif()

    file(SHA256 ${archive} hash)
    if (NOT hash STREQUAL LLAMA_CPP_PYTHON_SHA256)
        message(FATAL_ERROR "${archive} is damaged; delete it and configure again")
    endif()

    # unpack under another name until it is complete
    file(REMOVE_RECURSE ${unpacked}.part)
    file(ARCHIVE_EXTRACT INPUT ${archive} DESTINATION ${unpacked}.part PATTERNS "${sdist}/vendor/llama.cpp/*")
    file(RENAME ${unpacked}.part/${sdist} ${unpacked})
    file(REMOVE_RECURSE ${unpacked}.part)
endfunction()

if (LLAMA_CPP_SOURCE_DIR)
    get_filename_component(pristine ${LLAMA_CPP_SOURCE_DIR} ABSOLUTE BASE_DIR ${CMAKE_SOURCE_DIR})
    if (NOT EXISTS ${pristine}/include/llama.h)
        message(FATAL_ERROR "LLAMA_CPP_SOURCE_DIR: ${pristine} is not a llama.cpp checkout")
    endif()
    set(commit "of ${pristine}")
    message(STATUS "llama.cpp: ${pristine}")
else()
    fetch_llama_cpp(pristine)
    # llama.cpp would take these from the git repository around its sources
    set(LLAMA_BUILD_COMMIT ${LLAMA_CPP_COMMIT})
    set(LLAMA_BUILD_NUMBER 0)
    set(GIT_EXE OFF CACHE INTERNAL "ggml's git")
    set(commit ${LLAMA_CPP_COMMIT})
    message(STATUS "llama.cpp: ${LLAMA_CPP_COMMIT} of llama-cpp-python ${LLAMA_CPP_PYTHON_VERSION}")
endif()

# the bindings repeat the declarations of llama.h, so they only fit this version of it
file(SHA256 ${pristine}/include/llama.h hash)
set(bindings)
if (hash STREQUAL LLAMA_H_SHA256)
    set(bindings ${LLAMA_CPP_PYTHON_VERSION})
endif()

#
# patches
#

set(patches)
set(patched_files)
set(added_files)
if (FIRSTLAYER)
    file(GLOB patches CONFIGURE_DEPENDS ${PATCH_DIR}/*.patch)
    if (NOT LLAMA_BUILD_UI)
        list(REMOVE_ITEM patches ${PATCH_DIR}/ui.patch)
    endif()
    foreach (patch ${patches})
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${patch})
        file(STRINGS ${patch} lines REGEX "^\\+\\+\\+ b/")
        foreach (line ${lines})
            string(REGEX REPLACE "^\\+\\+\\+ b/([^\t]*).*" "\\1" name "${line}")
            list(APPEND patched_files ${name})
        endforeach()
    endforeach()
    list(REMOVE_DUPLICATES patched_files)
    file(GLOB added_files CONFIGURE_DEPENDS RELATIVE ${PATCH_DIR} ${PATCH_DIR}/src/*)
endif()

# everything except the patched files; a file with the same timestamp is not copied again
set(exclude)
foreach (name ${patched_files})
    string(REPLACE "." "\\." regex "/${name}$")
    list(APPEND exclude REGEX ${regex} EXCLUDE)
endforeach()
file(COPY ${pristine}/ DESTINATION ${LLAMA_CPP_DIR} PATTERN .git EXCLUDE PATTERN build EXCLUDE ${exclude})

set(staging ${CMAKE_BINARY_DIR}/patching)
file(REMOVE_RECURSE ${staging})
foreach (name ${patched_files})
    if (NOT EXISTS ${pristine}/${name})
        message(FATAL_ERROR "patches/ changes ${name}, which ${pristine} does not have; use the llama.cpp of "
                            "llama-cpp-python ${LLAMA_CPP_PYTHON_VERSION} (${LLAMA_CPP_COMMIT})")
    endif()
    get_filename_component(folder ${staging}/${name} DIRECTORY)
    file(COPY ${pristine}/${name} DESTINATION ${folder})
endforeach()

if (patches)
    find_package(Git REQUIRED)
endif()
foreach (patch ${patches})
    # the ceiling hides the repository around the build folder, where git would otherwise look for the files
    execute_process(
        COMMAND ${CMAKE_COMMAND} -E env GIT_CEILING_DIRECTORIES=${CMAKE_BINARY_DIR} ${GIT_EXECUTABLE} apply ${patch}
        WORKING_DIRECTORY ${staging}
        RESULT_VARIABLE failed
        ERROR_VARIABLE  reason)
    if (failed)
        message(FATAL_ERROR "${patch} does not apply to ${pristine}; use the llama.cpp of "
                            "llama-cpp-python ${LLAMA_CPP_PYTHON_VERSION} (${LLAMA_CPP_COMMIT})\n${reason}")
    endif()
endforeach()

foreach (name ${patched_files})
    configure_file(${staging}/${name} ${LLAMA_CPP_DIR}/${name} COPYONLY)
endforeach()
foreach (name ${added_files})
    configure_file(${PATCH_DIR}/${name} ${LLAMA_CPP_DIR}/${name} COPYONLY)
endforeach()

# restore files that are no longer patched
foreach (name ${FIRSTLAYER_PATCHED_FILES})
    if (NOT name IN_LIST patched_files AND EXISTS ${pristine}/${name})
        configure_file(${pristine}/${name} ${LLAMA_CPP_DIR}/${name} COPYONLY)
        file(TOUCH ${LLAMA_CPP_DIR}/${name})
    endif()
endforeach()
set(FIRSTLAYER_PATCHED_FILES ${patched_files} CACHE INTERNAL "files of llama.cpp that patches/ has changed")
