"""A party of several processes, its ranks: who holds which words, and how they compute together."""
