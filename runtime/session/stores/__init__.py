"""What outlives a session on disk: stored randomness, and the client's kept weights."""
