"""The row passes as Triton kernels; nothing outside this package imports triton."""
