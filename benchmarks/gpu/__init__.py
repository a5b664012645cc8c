"""`python -m benchmarks gpu`: tests, times, memory and errors on one GPU, beside other libraries' kernels.

`command.py` runs it, `cases.py` says what is measured and in which order, `measure.py` measures one case inside the
process of `worker.py` (one of sampling: `sampling.py`, of a policy loss: `policy.py`; what they share: `session.py`),
`checks.py` runs the tests, `table.py` prints.
"""
