"""the loss and the decoding steps once more, faster, for a CUDA GPU; and, on every device, how many
heads pay. Nothing here is needed"""
