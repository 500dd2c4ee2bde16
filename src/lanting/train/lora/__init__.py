"""LoRA training: examples from a folder, what they become once and for all, the frozen network, the run."""
