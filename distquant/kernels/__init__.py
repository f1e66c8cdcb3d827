"""Quantization kernels. `reference` is plain torch and the truth; faster ones must be bit-equal to it.

`cpu` is native code, `gpu` is Triton, `with_bitsandbytes` calls that library; all offer the same functions, and
`choice` picks one for a device.
"""
