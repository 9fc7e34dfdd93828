"""Hot loops: matrix products modulo 2**64 and table evaluation, in numba on the CPU."""
