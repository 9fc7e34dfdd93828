"""Two-party protocols on secret shares, one per file, each with its cost formula."""
