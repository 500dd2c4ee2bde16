// A block of the transformer in one call, see block.cpp.
#pragma once
#include "table.h"

namespace lt {

int64_t block_bytes(const Table& table, const Block& block);
void run_block(const Table& table, const Block& block);

}  // namespace lt
