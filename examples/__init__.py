"""Training loops to copy from, built on the public names of `srpo_kernels`."""
