// Logits of llama.cpp, f32 key/value cache: logits MODEL.gguf IDS OUT
// IDS: one window a line, token ids between spaces. OUT: f32, all positions of all windows.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "llama.h"

static void quiet(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    if (level >= GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

int main(int argc, char ** argv) {
    if (argc != 4) return 2;
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers = 0;
    struct llama_model * model = llama_model_load_from_file(argv[1], mp);
    if (!model) return 1;
    const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    FILE * in = fopen(argv[2], "r"), * out = fopen(argv[3], "wb");
    if (!in || !out) return 1;
    static char line[1 << 20];
    while (fgets(line, sizeof line, in)) {
        static llama_token ids[65536];
        int n = 0;
        for (char * word = strtok(line, " \n"); word && n < 65536; word = strtok(NULL, " \n")) ids[n++] = atoi(word);
        struct llama_context_params cp = llama_context_default_params();
        cp.n_ctx = cp.n_batch = cp.n_ubatch = n;
        cp.n_threads = cp.n_threads_batch = 1;
        cp.type_k = cp.type_v = GGML_TYPE_F32;
        cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
        struct llama_context * context = llama_init_from_model(model, cp);
        if (!context) return 1;
        struct llama_batch batch = llama_batch_init(n, 0, 1);
        batch.n_tokens = n;
        for (int i = 0; i < n; i++) {
            batch.token[i] = ids[i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
        }
        if (llama_decode(context, batch)) return 1;
        for (int i = 0; i < n; i++) fwrite(llama_get_logits_ith(context, i), sizeof(float), vocab, out);
        llama_batch_free(batch);
        llama_free(context);
    }
    return fclose(out);
}
