"""Speed, memory and error of dlogp_kernels beside plain PyTorch: `python -m benchmarks --help`."""
