"""`python -m dlogp_kernels.cli`, the same as `dlogp`."""

from . import main

main()
