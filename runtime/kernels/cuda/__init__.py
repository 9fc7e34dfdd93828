"""The hot loops as Triton kernels, for words on CUDA. Imported when such words are first met."""
