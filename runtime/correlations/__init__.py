"""Correlated randomness: the generator, and what the dealer gives to the two parties."""
