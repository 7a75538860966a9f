"""What checks kernels without a GPU: the compile gate, the watched interpreter, meters of calls."""
