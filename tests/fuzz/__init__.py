"""Random calls of the public functions, each made from one integer, held to the fp64 oracle ``reference``."""
