"""The plugin of verl, and `python -m srpo_kernels.integrations.verl`, which says whether verl sees it."""
