"""``python -m srpo_kernels.verify``: does the library compute the right numbers on this machine, and how fast?"""
