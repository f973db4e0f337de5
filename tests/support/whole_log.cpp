// Preloaded into a tool of llama.cpp: at its end, wait until its log is written.
// Its logging thread is not waited for otherwise (llama.cpp's issue 22142), and last lines are lost now and then.

struct common_log;

[[gnu::weak]] common_log * common_log_main();
[[gnu::weak]] void common_log_flush(common_log * log);

namespace {

struct at_exit {
    ~at_exit() {
        if (common_log_main) {
            common_log_flush(common_log_main());
        }
    }
} flush;

}
