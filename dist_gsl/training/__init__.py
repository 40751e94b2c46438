"""Training a network so that its neurons die: loop, state, checkpoints, and what a Ray Train worker runs."""
