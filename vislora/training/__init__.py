"""The training loop, optimizers, checkpoints."""
