"""DAPO beside three reweightings on the demo task: `python -m dlogp_kernels.demo.reweighting`."""
