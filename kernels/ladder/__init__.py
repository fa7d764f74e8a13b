"""The kernels of ops in short steps, the naive one first: to be read and timed (README.md)."""
