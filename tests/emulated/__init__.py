"""The raw operators' CUDA kernels on CPU tensors, by the emulator: one module per operation."""
