"""From a call to its result: order, chunks, products, gradients."""
