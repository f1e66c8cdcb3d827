"""Quantization kernels. `reference` is plain torch and the truth; faster ones must be bit-equal to it.

`cpu` is native code, `gpu` is Triton, `with_bitsandbytes` calls that library. All offer the functions of `protocol`;
`choice` picks one module for a device.
"""
