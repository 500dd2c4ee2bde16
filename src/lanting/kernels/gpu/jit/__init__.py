"""Triton's kernels. They import `triton`, so import them inside functions, where `here.available` says yes."""
