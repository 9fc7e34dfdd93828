"""Hot loops: matrix products modulo 2**64 and AES trees, compiled by numba for the CPU."""
