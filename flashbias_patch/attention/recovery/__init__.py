"""What happens after a failure: errors, the next backend, gradients after a failed backward, replay
of a checkpoint."""
