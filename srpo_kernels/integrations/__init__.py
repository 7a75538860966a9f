"""Trainers that this library plugs into. Nothing here is imported by `import srpo_kernels`."""
