#pragma once

#include <exception>
#include <string>

// message of the last error in this thread
extern thread_local std::string llama_firstlayer_last_error;

// C interface: exceptions become messages
template <typename F> static auto llama_firstlayer_guarded(F && f, decltype(f()) failure) -> decltype(f()) {
    llama_firstlayer_last_error.clear();
    try {
        return f();
    } catch (const std::exception & err) {
        llama_firstlayer_last_error = err.what();
        return failure;
    }
}
