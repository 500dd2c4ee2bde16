// Every kernel once, on numbers that are the same everywhere: driver LIBRARY SET THREADS prints what comes out, a line
// each, so that instruction sets and machines can be compared. With two callers at once, for ThreadSanitizer.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "abi.h"

namespace {

void* library = nullptr;

template <class... A> void call(const char* name, A... given) {
  auto function = reinterpret_cast<int (*)(A...)>(dlsym(library, name));
  if (!function || function(given...)) fprintf(stderr, "%s failed\n", name), exit(1);
}

struct Dice {
  uint32_t state = 1;
  uint32_t bits() { return (state = state * 1664525 + 1013904223) >> 8; }
  float number() { return float(bits() & 0xffff) / 32768 - 1; }
  std::vector<float> numbers(int64_t count) {
    std::vector<float> out(count);
    for (float& x : out) x = number();
    return out;
  }
};

std::string text;

template <class T> void show(const std::string& name, const std::vector<T>& numbers) {
  text += name;
  char word[32];
  for (T x : numbers) snprintf(word, sizeof word, " %.9g", double(x)), text += word;
  text += '\n';
}

Matrix matrix(std::vector<float>& x, int64_t rows) {
  int64_t columns = int64_t(x.size()) / rows;
  return {x.data(), rows, columns, columns, INT64_MAX, 0, FLOAT32};
}

struct Rounded {  // rows, with room for panels of any height
  std::vector<int8_t> data;
  std::vector<float> scale;
  std::vector<int32_t> sum;
  Codes codes;
  Rounded(int64_t rows, int64_t columns)
      : data((rows + 16) * (columns + 64) * 2), scale(rows), sum(rows), codes{data.data(), scale.data(), sum.data(), rows, columns} {}
};

struct Form {
  const char* name;
  int32_t kind;
  int64_t columns, group, block, bytes;  // values and bytes of a block
  std::vector<int> halves;               // where its float16 lie
};

const std::vector<Form> forms = {
    {"int8", INT8, 100, 100, 1, 1, {}},       {"int8g", INT8, 224, 16, 1, 1, {}},
    {"int4g16", INT4, 240, 16, 2, 1, {}},     {"int4g32", INT4, 224, 32, 2, 1, {}},
    {"int4g64", INT4, 192, 64, 2, 1, {}},     {"int4g128", INT4, 256, 128, 2, 1, {}},
    {"q4_0", Q4_0, 96, 0, 32, 18, {0}},       {"q8_0", Q8_0, 96, 0, 32, 34, {0}},
    {"q4_k", Q4_K, 512, 0, 256, 144, {0, 2}}, {"q6_k", Q6_K, 512, 0, 256, 210, {208}},
};

void products(const Form& form, bool loud) {
  constexpr int64_t outputs = 45, rows = 15;
  Dice dice;
  int64_t blocks = outputs * form.columns / form.block;
  std::vector<uint8_t> data(blocks * form.bytes);
  for (uint8_t& x : data) x = uint8_t(dice.bits());
  for (int64_t b = 0; b < blocks; b++)
    for (int place : form.halves) {
      data[b * form.bytes + place] = uint8_t(dice.bits());
      data[b * form.bytes + place + 1] = uint8_t(0x20 | (dice.bits() & 0x83));
    }
  std::vector<float> scale = dice.numbers(form.group ? outputs * form.columns / form.group : 0), bound(outputs);
  Weight w{data.data(), scale.data(), bound.data(), outputs, form.columns, int64_t(data.size()) / outputs, form.group, form.kind, 0};
  call("lt_bounds", &w, bound.data());
  std::vector<int8_t> expanded(outputs * form.columns);
  call("lt_expand", &w, expanded.data());
  std::vector<float> x = dice.numbers(rows * form.columns), out(rows * outputs), bias = dice.numbers(outputs);
  Rounded rounded(rows, form.columns);
  Matrix from = matrix(x, rows);
  call("lt_quantize", &from, &rounded.codes);
  std::vector<float> gates = dice.numbers(2 * outputs);
  Result plain{matrix(out, rows), bias.data(), {}, GELU};
  call("lt_product", &rounded.codes, &w, &plain);
  Result added{matrix(out, rows), nullptr, {gates.data(), outputs, rows, 4, 2}, ADD};
  call("lt_product", &rounded.codes, &w, &added);
  if (!loud) return;
  show(std::string("codes.") + form.name, expanded);
  show(std::string("bound.") + form.name, bound);
  show(std::string("product.") + form.name, out);
}

void others(bool loud) {
  constexpr int64_t items = 2, tokens = 37, heads = 3, width = 64, all = items * tokens * heads * width;
  Dice dice;
  std::vector<float> q = dice.numbers(all), k = dice.numbers(all), v = dice.numbers(all), out(all);
  std::vector<float> cos = dice.numbers(tokens * width / 2), sin = dice.numbers(tokens * width / 2), weights = dice.numbers(4 * width);
  const float* each = weights.data();
  Turn turn{q.data(), k.data(), cos.data(), sin.data(), each, each + width, each + 2 * width, each + 3 * width,
            items,    tokens,   heads,      width,      5,    1e-6f,        FLOAT32};
  call("lt_turn", &turn);
  std::vector<uint8_t> mask(items * 9);
  for (uint8_t& x : mask) x = dice.bits() & 1;
  Attention attention{q.data(), k.data(), v.data(), out.data(), mask.data(), items, tokens, tokens, heads, width, 9, FLOAT32};
  call("lt_attend", &attention);
  std::vector<float> normed(all), shift = dice.numbers(heads * width), scale = dice.numbers(heads * width), half(all);
  Matrix from = matrix(q, items * tokens), to = matrix(normed, items * tokens);
  PerRow one{shift.data(), 0, INT64_MAX, 0, 1}, two{scale.data(), 0, INT64_MAX, 0, 1};
  call("lt_norm", &from, &one, &two, &to, static_cast<Codes*>(nullptr));
  call("lt_norm_silu", &from, const_cast<const float*>(scale.data()), &to, 1);
  Result gelu{matrix(half, items * tokens), nullptr, {}, GELU};
  call("lt_activate", &from, &gelu);
  if (!loud) return;
  show("turn.q", q), show("turn.k", k), show("attention", out), show("norm_silu", normed), show("gelu", half);
}

void convolutions(bool loud) {
  const int64_t in = 20, out = 36, height = 5, width = 37;
  Dice dice;
  std::vector<float> x = dice.numbers(height * width * in), weight = dice.numbers(out * in * 9), bias = dice.numbers(48);
  std::vector<float> gamma = dice.numbers(32), sum = dice.numbers(height * width * out), doubled(4 * height * width * out);
  for (int32_t grow : {0, 1}) {
    std::vector<float> laid(16 * 32 * 48);
    ConvWeight from{weight.data(), laid.data(), in, out, FLOAT32, grow};
    call("lt_conv_weight", &from);
    float *to = grow ? doubled.data() : sum.data(), *add = grow ? nullptr : to, *first = grow ? nullptr : gamma.data();
    Conv conv{x.data(), to, add, laid.data(), bias.data(), first, 1, height, width, in, out, FLOAT32, grow};
    call("lt_convolve", &conv);
  }
  if (loud) show("convolution", sum), show("convolution.doubled", doubled);
}

// A Linear of int8 with a scale a row, and all that a block needs.
struct Linear {
  std::vector<int8_t> data;
  std::vector<float> scale, bound, bias;
  Affine affine;
  Linear(Dice& dice, int64_t rows, int64_t columns)
      : data(rows * columns), scale(rows), bound(rows), bias(dice.numbers(rows)) {
    for (int8_t& x : data) x = int8_t(dice.bits());
    for (float& x : scale) x = float(dice.bits() & 0xff) / 65536;
    affine = {{reinterpret_cast<uint8_t*>(data.data()), scale.data(), bound.data(), rows, columns, columns, columns, INT8, 0}, bias.data()};
    call("lt_bounds", &affine.weight, bound.data());
  }
};

void whole_block(bool loud) {
  constexpr int64_t items = 2, heads = 2, head = 32, width = heads * head, hidden = 200, txt = 5, img = 21;
  Dice dice;
  std::vector<Linear> linears;
  for (int i = 0; i < 12; i++) linears.emplace_back(dice, i % 6 == 4 ? hidden : width, i % 6 == 5 ? hidden : width);
  std::vector<float> rows[] = {dice.numbers(items * txt * width), dice.numbers(items * img * width)};
  std::vector<float> vectors[] = {dice.numbers(items * 6 * width), dice.numbers(items * 2 * 6 * width)};
  auto stream = [&](int i) {
    int64_t count = i ? img : txt, each = i ? 2 : 1;
    const Linear* own = &linears[i * 6];
    Matrix to{rows[i].data(), items * count, width, width, count, count * width, FLOAT32};
    PerRow by{vectors[i].data(), 6 * width, count, 7, int32_t(each)};
    return Stream{to, by, items * each, FLOAT32, {own[0].affine, own[1].affine, own[2].affine}, own[3].affine, own[4].affine, own[5].affine};
  };
  constexpr int64_t tokens = txt + img;
  std::vector<float> cos = dice.numbers(tokens * head / 2), sin = dice.numbers(tokens * head / 2), norms = dice.numbers(4 * head);
  const float* norm = norms.data();
  std::vector<uint8_t> mask = {1, 1, 1, 1, 1, 1, 1, 1, 0, 0};
  Block block{stream(0), stream(1),
              {nullptr, nullptr, cos.data(), sin.data(), norm, norm + head, norm + 2 * head, norm + 3 * head,
               items, tokens, heads, head, txt, 1e-6f, FLOAT32},
              {nullptr, nullptr, nullptr, nullptr, mask.data(), items, tokens, tokens, heads, head, txt, FLOAT32}, nullptr};
  int64_t bytes = reinterpret_cast<int64_t (*)(const Block*)>(dlsym(library, "lt_block_bytes"))(&block);
  block.room = aligned_alloc(64, size_t(bytes + 63) / 64 * 64);
  call("lt_block", &block);
  free(block.room);
  if (loud) show("product.block.text", rows[0]), show("product.block.picture", rows[1]);
}

void everything(bool loud) {
  for (const Form& form : forms) products(form, loud);
  others(loud);
  convolutions(loud);
  whole_block(loud);
}

}  // namespace

int main(int, char** given) {
  library = dlopen(given[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  call("lt_use", static_cast<const char*>(given[2]));
  reinterpret_cast<void (*)(int)>(dlsym(library, "lt_threads"))(atoi(given[3]));
  std::thread other([] { everything(false); });
  everything(true);
  other.join();
  fputs(text.c_str(), stdout);
}
