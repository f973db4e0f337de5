// Print the sites of a model and the first values of a token's rows, with the C API of llama-firstlayer.h:
//
//     cc examples/rows.c -I build/llama.cpp/src -I build/llama.cpp/include -I build/llama.cpp/ggml/include
//        -L build/bin -Wl,-rpath,build/bin -lllama -lggml -lggml-base -o rows
//     ./rows MODEL.gguf TOKEN

#include "llama-firstlayer.h"

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char ** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: rows MODEL.gguf TOKEN\n");
        return 2;
    }

    struct llama_firstlayer_analysis * an = llama_firstlayer_init(argv[1], 32, 0, false);
    if (!an) {
        fprintf(stderr, "%s\n", llama_firstlayer_error());
        return 1;
    }

    struct llama_firstlayer_site site;
    int64_t                      width = 0;
    for (int32_t i = 0; llama_firstlayer_get_site(an, i, &site) == 0; ++i) {
        width += site.width;
    }

    const llama_token token  = atoi(argv[2]);
    float *           rows   = malloc(width * sizeof(float));
    const int         failed = !rows || llama_firstlayer_eval(an, &token, 1, rows) != 0;
    if (failed) {
        fprintf(stderr, "%s\n", llama_firstlayer_error());
    }

    const float * row = rows;
    for (int32_t i = 0; !failed && llama_firstlayer_get_site(an, i, &site) == 0; ++i) {
        printf("%s: %lld values, the first is %g\n", site.name, (long long) site.width, row[0]);
        row += site.width;
    }

    free(rows);
    llama_firstlayer_free(an);
    return failed;
}
