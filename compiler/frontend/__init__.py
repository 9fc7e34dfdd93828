"""From a model on disk to a captured graph."""
