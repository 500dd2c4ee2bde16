"""Kernels for GPUs, in Triton, each with a twin in plain torch that defines it.

    here       where Triton's kernels run, and which of several ways is fastest
    twins      what every operation means, in torch; used where Triton is not
    rows       norms, modulation, rounding, GELU, gates, turns: one pass over memory each
    products   matrix products in 8 and 4 bits
    attention  which of the attentions on this machine is taken
    eight_bit  attention with scores in 8 bits, if it is asked for
    jit        the kernels themselves; only imported where Triton is

Activations are (B, n, W), their last axis contiguous, or (rows, W). Nothing here knows a network.
"""
