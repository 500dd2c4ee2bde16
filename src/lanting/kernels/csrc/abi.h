// What Python and C++ agree on: plain structures and functions, no torch headers. `ABI` counts incompatible changes.
#pragma once
#include <cstdint>

enum { ABI = 7 };
enum Number : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Kind : int32_t { INT8 = 0, INT4 = 1, Q4_0 = 2, Q8_0 = 3, Q4_K = 4, Q6_K = 5, BF16 = 6, F32 = 7 };
enum Mode : int32_t { STORE = 0, GELU = 1, ADD = 2 };  // ADD: what is there += gate * value

// Rows of a matrix: `items` of `period` rows each, `item_stride` and `stride` elements apart; rows are contiguous.
struct Matrix {
  void* data;
  int64_t rows, columns, stride, period, item_stride;
  int32_t type;  // Number
};

// One vector for every row, or per item one for its first `split` rows and one for the rest (`each` is 1 or 2).
struct PerRow {
  const float* data;
  int64_t stride, period, split;
  int32_t each;
};

// Rows laid out for the micro-kernel of one ISA: rounded to int8, each with a scale of its own, or dense, in the numbers
// that plain weights are multiplied in (`Table::dense`). In panels; where the set can read them so (`Table::in_rows`),
// and always for the products of wide.h, one after the other.
struct Codes {
  int8_t* data;    // (panels, columns / 4, panel, 4), or (panels, columns / 2, panel, 2) of bfloat16, or (rows, stride) of float32, or of int16
  float* scale;    // (rows) of int8, as the sums
  int32_t* sum;    // (rows)
  int64_t rows, columns;
  int32_t type;    // BFLOAT16 if dense, anything else for int8
  int64_t stride;  // numbers from row to row, 0 for panels, or as `row_stride` says; behind int8 are zeros up to 64
};

// A packed weight as its file has it, (rows, columns), a row `row_bytes` long.
struct Weight {
  const uint8_t* data;
  const void* scale;   // of INT8 and INT4: (rows, columns / group); GGUF's kinds hold theirs
  const float* bound;  // (rows) what no value of a row exceeds, see `row_bound`
  int64_t rows, columns, row_bytes, group;
  int32_t kind, scale_type;
};

struct Result {
  Matrix to;
  const float* bias;  // (columns) or null
  PerRow gate;        // of ADD
  int32_t mode;
};

struct Attention {
  const void *q, *k, *v;    // (items, tokens or keys, heads, width) contiguous
  void* out;                // (items, tokens, heads * width)
  const uint8_t* mask;      // (items, masked) over the first keys, or null
  int64_t items, tokens, keys, heads, width, masked;
  int32_t type;             // FLOAT32 or BFLOAT16
};

// Queries and keys (items, tokens, heads, width), normed and turned where they are.
struct Turn {
  void *q, *k;
  const float *cos, *sin;                            // (tokens, width / 2)
  const float *first_q, *first_k, *rest_q, *rest_k;  // (width) weights of the norms: of the first tokens, of the rest
  int64_t items, tokens, heads, width, first;
  float eps;
  int32_t type;
};

// A 3x3 convolution's weight (out, in, 3, 3) and where it goes, laid out for pictures of a type.
struct ConvWeight {
  const float* from;
  void* to;
  int64_t in, out;
  int32_t type, grow;
};

// A 3x3 convolution with a margin of zeros.
struct Conv {
  const void* x;       // (items, height, width, in)
  void* out;           // (items, height, width, outs); with `grow` twice as high and wide
  const void* add;     // laid out like `out`, which it may be; or null
  const void* weight;  // see ConvWeight
  const float* bias;   // (outs), rounded up to 16
  const float* gamma;  // (in), rounded up to 16: x / |x| * gamma, then SiLU, comes first; or null
  int64_t items, height, width, in, outs;
  int32_t type, grow;
};

// A Linear: a weight as its file has it and a bias, or null.
struct Affine {
  Weight weight;
  const float* bias;
};

// One stream of a block: rows that it changes where they are, and what it is multiplied with.
struct Stream {
  Matrix rows;      // (items, rows, columns)
  PerRow vectors;   // shift, scale and gate of attention, then of the feed-forward: six in a row, `count` such sixes
  int64_t count;
  int32_t type;     // Number of the vectors, FLOAT32 or BFLOAT16, whatever the pointer says
  Affine in[3];     // to queries, keys, values: of one kind
  Affine out, up, down;
};

// A whole block. `turn` and `attention` know sizes, norms, angles and the mask; where rows lie is the block's own
// business. `room` has as many bytes as lt_block_bytes says, aligned to 64.
struct Block {
  Stream txt, img;  // in the order of their tokens
  Turn turn;
  Attention attention;
  void* room;
};
