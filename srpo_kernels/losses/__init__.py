"""The losses on ``[n]`` vectors of rows, and their options."""
