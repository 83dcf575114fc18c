"""Published checkpoints on their way into a bundle: one module per concern, beginning with what tensors are called."""
