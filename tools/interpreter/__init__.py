"""Triton's interpreter as an instrument: what kernels access, what they cost, and a GPU's roundings."""
