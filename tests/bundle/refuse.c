/* What the C interface refuses, with a reason, instead of crashing. */
#include "attar_kernels.h"
#include <stdio.h>
#include <string.h>

static int bad;

static void refused(const char *what, attar_status got, attar_status want, const char *reason) {
  if (got != want || !strstr(attar_last_error(), reason)) {
    printf("%s: status %d, \"%s\"\n", what, (int)got, attar_last_error());
    bad = 1;
  }
}

int main(void) {
  static const unsigned char bytes[64 * 64];
  static const uint64_t words[2] = {8, 64}, ones[2] = {1, 64}, zeros[2] = {1, 8};
  attar_linear_spec spec = {"gptq", 4, 64, 1, 64, 64};
  attar_part parts[3] = {{"qweight", "I32", words, 2, bytes, 2048}, {"qzeros", "I32", zeros, 2, bytes, 32}, {"scales", "F16", ones, 2, bytes, 128}};
  attar_linear *linear = NULL;
  float x[64] = {0}, y[64];
#define TRY attar_linear_prepare(&spec, parts, 3, ATTAR_ACTIVATIONS_F32, &linear)
  refused("no spec", attar_linear_prepare(NULL, parts, 3, ATTAR_ACTIVATIONS_F32, &linear), ATTAR_INVALID, "null");
  refused("no parts", attar_linear_prepare(&spec, NULL, 3, ATTAR_ACTIVATIONS_F32, &linear), ATTAR_INVALID, "null");
  refused("no place", attar_linear_prepare(&spec, parts, 3, ATTAR_ACTIVATIONS_F32, NULL), ATTAR_INVALID, "null");
  refused("activations", attar_linear_prepare(&spec, parts, 3, (attar_activations)9, &linear), ATTAR_INVALID, "activations is 9");
  spec.layout = "q4_0"; refused("blocks", TRY, ATTAR_INVALID, "compressed-tensors");
  spec.layout = "marlin"; refused("layout", TRY, ATTAR_INVALID, "compressed-tensors"); spec.layout = NULL;
  refused("no layout", TRY, ATTAR_INVALID, "layout is null"); spec.layout = "gptq";
  spec.bits = 5; refused("bits", TRY, ATTAR_INVALID, "bits is 5"); spec.bits = 4;
  spec.group_size = 0; refused("group", TRY, ATTAR_INVALID, "group_size is 0");
  spec.group_size = 48; refused("odd group", TRY, ATTAR_LAYOUT, "48"); spec.group_size = 64;
  spec.in_features = 1ull << 40; refused("size", TRY, ATTAR_INVALID, "in_features"); spec.in_features = 64;
  spec.out_features = 128; refused("shape", TRY, ATTAR_LAYOUT, "qweight"); spec.out_features = 64;
  parts[0].bytes = 2047; refused("short", TRY, ATTAR_INVALID, "qweight"); parts[0].bytes = 2048;
  parts[0].data = NULL; refused("no data", TRY, ATTAR_INVALID, "null"); parts[0].data = bytes;
  parts[2].dtype = "F7"; refused("dtype", TRY, ATTAR_INVALID, "F7"); parts[2].dtype = "F16";
  parts[2].suffix = "scale"; refused("suffix", TRY, ATTAR_INVALID, "scale"); parts[2].suffix = "scales";
  refused("missing part", attar_linear_prepare(&spec, parts, 2, ATTAR_ACTIVATIONS_F32, &linear), ATTAR_LAYOUT, "scales");
  refused("no linear", attar_linear_matmul(NULL, x, 1, y), ATTAR_INVALID, "null");
  refused("good", TRY, ATTAR_OK, "");
  refused("no x", attar_linear_matmul(linear, NULL, 1, y), ATTAR_INVALID, "null");
  refused("too many", attar_linear_matmul(linear, x, (size_t)-1, y), ATTAR_INVALID, "m is over");
  refused("nothing", attar_linear_matmul(linear, NULL, 0, NULL), ATTAR_OK, "");
  refused("product", attar_linear_matmul(linear, x, 1, y), ATTAR_OK, "");
  if (!attar_linear_resident_bytes(linear) || attar_linear_resident_bytes(NULL)) bad = 1;
  attar_linear_free(linear);
  attar_linear_free(NULL);
  refused("threads", attar_set_threads(2), ATTAR_INVALID, "threads"); /* the pool exists since the product */
  return bad;
}
