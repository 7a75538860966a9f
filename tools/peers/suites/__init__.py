"""The peers' own tests, with this library in the place of their functions."""
