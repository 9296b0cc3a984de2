"""Trees of merges on a back end: the CPU's threads, CUDA streams, or NumPy as their meaning."""
