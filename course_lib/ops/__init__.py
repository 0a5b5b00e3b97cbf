"""Pure functions on tensors, without parameters. One folder per operation."""
