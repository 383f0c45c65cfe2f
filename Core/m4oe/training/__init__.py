"""Training: phantoms, batches, losses and the loop."""
