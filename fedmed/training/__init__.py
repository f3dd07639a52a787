"""Local optimisation: examples, batches, the trainer. Knows no algorithm."""
