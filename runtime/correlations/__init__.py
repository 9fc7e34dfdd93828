"""Correlated randomness: the pseudorandom generator, and what the dealer sends to the parties."""
