"""Quantization kernels. `reference` is plain torch and the truth; faster ones must be bit-equal to it."""
