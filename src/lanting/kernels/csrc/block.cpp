// A block of the transformer in one call, made of the kernels that are here already: small models wait for their calls
// longer than for their sums.
#include "block.h"

#include <algorithm>
#include <cstring>

namespace lt {
namespace {

constexpr int64_t NARROW = 1024;  // columns up to which rows lie one after the other; wider ones would share places in L1

int64_t up_to(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// What is alive together in the room. Laid out from address 0 it says how much room is needed.
class Room {
 public:
  Room(const Block& b, const Table& table) : table_(table), at_(reinterpret_cast<uintptr_t>(b.room)), begin_(at_) {
    const Stream* streams[] = {&b.txt, &b.img};
    int64_t width = b.turn.heads * b.turn.width, size = b.turn.type == BFLOAT16 ? 2 : 4;
    for (int i = 0; i < 2; i++) {
      rows[i] = codes(*streams[i], streams[i]->rows.columns);
      vectors[i] = static_cast<float*>(take(streams[i]->count * 6 * streams[i]->rows.columns * 4));
    }
    uintptr_t shared = at_;  // attention and the feed-forward take turns
    for (void*& each : joint) each = take(b.turn.items * b.turn.tokens * width * size);
    uintptr_t end = at_;
    at_ = shared;
    int64_t most = 0, wide = 0;
    for (const Stream* s : streams) most = std::max(most, s->rows.rows), wide = std::max(wide, s->up.weight.rows);
    hidden = take(most * wide * size);
    between = codes(most, wide);
    at_ = std::max(end, at_);
  }

  Codes codes(const Stream& s, int64_t columns) { return codes(s.rows.rows, columns); }
  int64_t bytes() const { return int64_t(at_ - begin_); }

  Codes rows[2];   // of either stream, as wide as the stream
  float* vectors[2];
  void* joint[4];  // queries, keys, values, and what attention makes of them: (items, tokens, width)
  void* hidden;    // of the feed-forward
  Codes between;   // the same for its second product

 private:
  void* take(int64_t bytes) {
    uintptr_t mine = at_;
    at_ += up_to(bytes, 64);
    return reinterpret_cast<void*>(mine);
  }

  Codes codes(int64_t count, int64_t columns) {  // as large as the larger type needs
    int64_t plain = table_.dense ? table_.codes_bytes(count, columns, 1) : 0;
    int8_t* data = static_cast<int8_t*>(take(std::max(plain, table_.codes_bytes(count, columns, 0))));
    float* scale = static_cast<float*>(take(count * 4));
    return {data, scale, static_cast<int32_t*>(take(count * 4)), count, columns, 0, 0};
  }

  const Table& table_;
  uintptr_t at_, begin_;
};

class Run {
 public:
  Run(const Table& table, const Block& block) : t_(table), b_(block), room_(block, table) {}

  void all() {
    const Stream* streams[] = {&b_.txt, &b_.img};
    for (int i = 0; i < 2; i++) {
      widen(*streams[i], i);
      Codes codes = normed(*streams[i], i, 0, streams[i]->in[0]);
      for (int each = 0; each < 3; each++) product(codes, streams[i]->in[each], {part(each, i), nullptr, {}, STORE});
    }
    attend();
    for (int i = 1; i >= 0; i--) {
      Codes codes = laid(room_.rows[i], part(3, i), streams[i]->out);
      product(codes, streams[i]->out, {streams[i]->rows, nullptr, vectors(*streams[i], i, 2), ADD});
    }
    for (int i = 1; i >= 0; i--) feed_forward(*streams[i], i);
  }

 private:
  PerRow vectors(const Stream& s, int i, int which) const {
    PerRow found = s.vectors;
    if (s.type == BFLOAT16) found.data = room_.vectors[i];
    found.data += which * s.rows.columns;
    return found;
  }

  void widen(const Stream& s, int i) {
    if (s.type != BFLOAT16) return;
    const uint16_t* from = reinterpret_cast<const uint16_t*>(s.vectors.data);
    for (int64_t j = 0; j < s.count * 6 * s.rows.columns; j++) {
      uint32_t bits = uint32_t(from[j]) << 16;
      memcpy(room_.vectors[i] + j, &bits, 4);
    }
  }

  Codes as(Codes codes, const Affine& linear) const {
    codes.type = linear.weight.kind == BF16 || linear.weight.kind == F32 ? BFLOAT16 : FLOAT32;
    codes.stride = t_.in_rows && !floats(codes) && codes.columns <= NARROW ? up_to(codes.columns, 64) : 0;
    return codes;
  }

  bool floats(const Codes& codes) const { return codes.type == BFLOAT16 && t_.dense == 4; }

  Codes normed(const Stream& s, int i, int first, const Affine& linear) {
    Codes codes = as(room_.rows[i], linear);
    t_.norm(s.rows, vectors(s, i, first), vectors(s, i, first + 1), nullptr, &codes);
    return codes;
  }

  Codes laid(Codes codes, const Matrix& rows, const Affine& linear) {
    codes = as(codes, linear);
    bool even = rows.rows <= rows.period && rows.columns % 2 == 0;
    bool fits = floats(codes) ? rows.type == FLOAT32 : codes.stride && codes.type == BFLOAT16;
    if (fits && even) {  // a product can read them where they are
      codes.data = static_cast<int8_t*>(rows.data), codes.stride = rows.stride;
      return codes;
    }
    t_.quantize(rows, codes);
    return codes;
  }

  void product(const Codes& codes, const Affine& linear, Result to) {
    to.bias = linear.bias;
    t_.product(codes, linear.weight, to);
  }

  // A stream's rows in a joint buffer: text comes first.
  Matrix part(int which, int i) const {
    int64_t width = b_.turn.heads * b_.turn.width, first = b_.turn.first, tokens = b_.turn.tokens;
    int64_t size = b_.turn.type == BFLOAT16 ? 2 : 4, count = i ? tokens - first : first;
    char* data = static_cast<char*>(room_.joint[which]) + (i ? first * width * size : 0);
    return {data, b_.turn.items * count, width, width, count, tokens * width, b_.turn.type};
  }

  void attend() {
    Turn turn = b_.turn;
    turn.q = room_.joint[0], turn.k = room_.joint[1];
    t_.turn(turn);
    Attention attention = b_.attention;
    attention.q = turn.q, attention.k = turn.k, attention.v = room_.joint[2], attention.out = room_.joint[3];
    t_.attend(attention);
  }

  void feed_forward(const Stream& s, int i) {
    int64_t wide = s.up.weight.rows;
    Matrix hidden{room_.hidden, s.rows.rows, wide, wide, s.rows.rows, 0, s.rows.type};
    product(normed(s, i, 3, s.up), s.up, {hidden, nullptr, {}, GELU});
    Codes between = room_.between;
    between.rows = s.rows.rows, between.columns = wide;
    product(laid(between, hidden, s.down), s.down, {s.rows, nullptr, vectors(s, i, 5), ADD});
  }

  const Table& t_;
  const Block& b_;
  Room room_;
};

}  // namespace

int64_t block_bytes(const Table& table, const Block& block) { return Room(block, table).bytes(); }

void run_block(const Table& table, const Block& block) { Run(table, block).all(); }

}  // namespace lt
