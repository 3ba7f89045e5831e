"""the loss and the decoding steps once more, faster, for a CUDA GPU. Nothing here is needed"""
