"""The core idea: how a weight is laid out, and how it is divided over ranks."""
