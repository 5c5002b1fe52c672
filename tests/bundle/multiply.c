/* multiply ARTIFACT LINEAR: y = x W^T with x[i] = (i % 7 - 3) / 4, from the artifact's own files; prints y, a number a line.
   cc -I ARTIFACT/kernels multiply.c ARTIFACT/kernels/libattar_kernels.so -Wl,-rpath,ARTIFACT/kernels */
#include "attar_kernels.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void die(const char *what, const char *why) { fprintf(stderr, "%s: %s\n", what, why); exit(2); }

static char *read_at(const char *folder, const char *name, long from, size_t *bytes) {
  char path[4096], *data;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *file = fopen(path, "rb");
  if (!file) die(path, "cannot be opened");
  if (!*bytes) { fseek(file, 0, SEEK_END); *bytes = (size_t)ftell(file); }
  if (!(data = calloc(*bytes + 1, 1)) || fseek(file, from, SEEK_SET) || fread(data, 1, *bytes, file) != *bytes) die(path, "cannot be read");
  fclose(file);
  return data;
}

int main(int argc, char **argv) {
  static char layout[32], yes[8], suffix[16][32], dtype[16][8], dims[64], name[256];
  static uint64_t shape[16][4];
  attar_linear_spec spec = {layout, 0, 0, 0, 0, 0};
  attar_part parts[16];
  attar_linear *linear;
  size_t n = 0, bytes = 0;
  if (argc != 3) die("usage", "multiply ARTIFACT LINEAR");
  if (attar_abi_version() != ATTAR_ABI_VERSION) die("library", "is not of this header");
  char key[256], *line = read_at(argv[1], "kernels/kernels.json", 0, &bytes);
  snprintf(key, sizeof key, "\n\"%s\":{", argv[2]);
  if (!(line = strstr(line, key))) die(argv[2], "is no packed linear");
  line += strlen(key); /* one line for each linear */
  *strchr(line, '\n') = 0;
  unsigned long long rows, columns, from, length;
  if (sscanf(line, "\"layout\":\"%31[^\"]\",\"bits\":%u,\"group_size\":%d,\"symmetric\":%7[a-z],\"out_features\":%llu,\"in_features\":%llu",
             layout, &spec.bits, &spec.group_size, yes, &rows, &columns) != 6) die(argv[2], "is not described as expected");
  spec.symmetric = !strcmp(yes, "true"), spec.out_features = rows, spec.in_features = columns;
  while ((line = strstr(line, "{\"suffix\":")) && n < 16) {
    if (sscanf(line, "{\"suffix\":\"%31[^\"]\",\"dtype\":\"%7[^\"]\",\"shape\":[%63[0-9,]],\"file\":\"%255[^\"]\",\"offset\":%llu,\"bytes\":%llu",
               suffix[n], dtype[n], dims, name, &from, &length) != 6) die(argv[2], "has a part that is not described as expected");
    parts[n].suffix = suffix[n], parts[n].dtype = dtype[n], parts[n].shape = shape[n], parts[n].rank = 0, parts[n].bytes = (size_t)length;
    for (char *dim = strtok(dims, ","); dim; dim = strtok(NULL, ",")) shape[n][parts[n].rank++] = strtoull(dim, NULL, 10);
    parts[n].data = read_at(argv[1], name, (long)from, &parts[n].bytes);
    n++, line++;
  }
  if (attar_linear_prepare(&spec, parts, n, ATTAR_ACTIVATIONS_F32, &linear)) die("prepare", attar_last_error());
  float *x = malloc(columns * sizeof *x), *y = malloc(rows * sizeof *y);
  for (size_t i = 0; i < columns; i++) x[i] = ((int)(i % 7) - 3) / 4.0f;
  if (attar_linear_matmul(linear, x, 1, y)) die("matmul", attar_last_error());
  for (size_t i = 0; i < rows; i++) printf("%.9g\n", (double)y[i]);
  attar_linear_free(linear);
  return 0;
}
