"""Pure modules: the networks of the family and nothing else (no files, devices, flags or processes)."""
