"""Two-party protocols that the ops are made of, one per file, each with its cost formula."""
