"""The parts that stay in a loaded model and run in its forward: communication, experts, adapters."""
