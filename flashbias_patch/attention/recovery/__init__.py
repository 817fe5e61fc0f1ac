"""Recovery from failures: errors, the next backend, gradients after a failed backward pass, and the
replay of checkpoints."""
