"""The homes of ranks: one process, torchrun (any launcher with env:// variables), or Ray."""
