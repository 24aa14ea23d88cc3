"""Storage: blobs under string keys, in host memory, on disk, on other machines. Knows nothing of tensors."""
