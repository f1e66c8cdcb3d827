"""Turns a model on `meta` into one rank's local model: sharded modules, streamed weights, styles, completeness."""
