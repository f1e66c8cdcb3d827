"""Checks of a loaded model: its fingerprint, and its perplexity."""
