"""One conversation between the roles: handshake, generation, sampling, text, stored randomness."""
