"""Native kernels for CPUs: products of 8-bit integers with packed weights, attention, and what lies between them.

`library.ready()` says whether they are built and run here; everything that uses them has a path in torch beside it.
"""
