"""Train a model for a lossy preset, or heads beside it: `mergec adapt`."""
