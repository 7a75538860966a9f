"""The losses beside their peers' own functions."""
