"""Train a model for a lossy preset: `mergec adapt`."""
