"""The compression kernels, one folder a backend with the same files in each; lowest of all layers but errors."""
