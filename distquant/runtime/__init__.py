"""Where ranks live: one process, torchrun (any launcher with env:// variables), or Ray."""
