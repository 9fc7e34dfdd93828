"""Runs programs: under the protocols, in the clear, simulated, or by CrypTen's stock protocols."""
