// One set of kernels, compiled for one instruction set.
#pragma once
#include "abi.h"

namespace lt {

struct Table {
  const char* name;
  int64_t (*codes_bytes)(int64_t rows, int64_t columns, int dense);
  int dense;   // bytes of a number of rows for plain weights: 2 bfloat16, 4 float32, 0 where it has no such products
  bool in_rows;  // whether products read rows of activations that lie one after the other
  void (*bounds)(const Weight&, float*);
  void (*expand)(const Weight&, int8_t*);  // all of a weight as the int8 that products see: for tests
  void (*quantize)(const Matrix&, const Codes&);
  void (*norm)(const Matrix&, const PerRow& shift, const PerRow& scale, const Matrix* rows, const Codes* codes);
  void (*product)(const Codes&, const Weight&, const Result&);
  void (*turn)(const Turn&);
  void (*attend)(const Attention&);
  void (*activate)(const Matrix& from, const Result&);
  void (*norm_silu)(const Matrix& from, const float* gamma, const Matrix& to, int silu);
  int64_t (*spin)(int32_t type, int64_t rounds, int64_t pieces);  // limits.h
  void (*pass)(const uint8_t* from, uint8_t* to, int64_t bytes);
  int (*conv_bytes)(int32_t type);  // vae.h
  void (*conv_weight)(const ConvWeight&);
  void (*convolve)(const Conv&);
};

}  // namespace lt
