"""What the size of chunks costs a GPU, on paper, for docs/gpu.md.

dW in fp32 is read and written once per product. Rows whose logits are alive are fewer than those whose bf16 dlogits
wait for one product of dX and one of dW: the table has the time for several numbers of these.
"""
