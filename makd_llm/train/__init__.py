"""Training: the two engines, the step, the loop."""
