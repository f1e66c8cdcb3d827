"""What stays in the model and runs in its forward: communication, experts, adapters."""
