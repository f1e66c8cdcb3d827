"""Modules that hold quantized weights, and what multiplies them."""
