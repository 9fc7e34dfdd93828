"""The graph: its text, its analyses, and the machinery that rewrites and checks it."""
