/* C interface of Attar's CPU kernels: multiply by packed weights as they lie in an artifact's files.
 *
 * attar_linear_prepare rearranges the bytes of one linear (it keeps none of the caller's memory),
 * attar_linear_matmul computes y = x W^T with it. A prepared linear may be used by several threads at
 * once. Results do not depend on the number of threads. kernels.json, beside this header, says which
 * parts each linear of the artifact has. C99; also C++.
 */
#ifndef ATTAR_KERNELS_H
#define ATTAR_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of this header; attar_abi_version() says that of the library. They must be equal. */
#define ATTAR_ABI_VERSION 1

typedef enum attar_status {
  ATTAR_OK = 0,
  ATTAR_INVALID = 1, /* an argument is null, unknown or out of range */
  ATTAR_LAYOUT = 2,  /* the bytes are not what the layout says */
  ATTAR_INTERNAL = 3 /* a defect of the library: please report it */
} attar_status;

/* How activations enter the products. */
typedef enum attar_activations {
  ATTAR_ACTIVATIONS_F32 = 0, /* as they are: exact up to f32 rounding */
  ATTAR_ACTIVATIONS_INT8 = 1 /* rounded to 8 bits per block: faster, with the error that kernels.json states */
} attar_activations;

/* What a packed linear is; the strings are those of kernels.json. */
typedef struct attar_linear_spec {
  const char *layout;    /* "compressed-tensors", "gptq", "gptq_v2", "awq" */
  uint32_t bits;         /* 2, 3, 4 or 8 */
  int32_t group_size;    /* columns that share a scale; -1: one scale per row */
  uint32_t symmetric;    /* not 0: the zero point is 2^(bits-1) everywhere */
  uint64_t out_features; /* rows of W */
  uint64_t in_features;  /* columns of W */
} attar_linear_spec;

/* One tensor of a packed linear, as the safetensors header describes it. */
typedef struct attar_part {
  const char *suffix;    /* "qweight", "weight_packed", ... */
  const char *dtype;     /* "I32", "F16", "BF16", ... */
  const uint64_t *shape; /* outermost first */
  size_t rank;           /* numbers in shape */
  const void *data;      /* little-endian bytes; any alignment */
  size_t bytes;          /* their number */
} attar_part;

typedef struct attar_linear attar_linear; /* ready to multiply */

/* ATTAR_ABI_VERSION of the library. */
uint32_t attar_abi_version(void);

/* Why the last call on this thread failed; "" when it did not. Valid until the next call on this thread. */
const char *attar_last_error(void);

/* Threads that matmul may use; before its first use only, 0 is one per core. */
attar_status attar_set_threads(size_t threads);

/* Rearranges one packed linear for multiplication with the best kernel of this CPU. */
attar_status attar_linear_prepare(const attar_linear_spec *spec, const attar_part *parts, size_t n_parts,
                                  attar_activations activations, attar_linear **linear);

/* y [m, out_features] = x [m, in_features] W^T, row-major f32. y must not overlap x. */
attar_status attar_linear_matmul(const attar_linear *linear, const float *x, size_t m, float *y);

/* Bytes that a prepared linear holds; 0 for null. */
size_t attar_linear_resident_bytes(const attar_linear *linear);

/* Null is allowed. */
void attar_linear_free(attar_linear *linear);

#ifdef __cplusplus
}
#endif

#endif
