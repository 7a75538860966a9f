"""The plugin of verl, and `python -m srpo_kernels.integrations.verl`, which says whether verl sees it."""

from importlib.util import find_spec

if find_spec("verl") is None:
    raise ImportError("srpo_kernels.integrations.verl needs verl: pip install 'srpo-kernels[verl]'")
