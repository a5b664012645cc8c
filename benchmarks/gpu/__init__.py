"""`python -m benchmarks gpu`: the two visits to a GPU; README.md beside this file says how to use them.

`command.py` runs a visit step by step in a process that never touches the GPU; the cases, of `smoke.py` and
`timing.py`, are done by processes that it survives (`processes.py`). `profile.py` runs ncu, `checks.py` the
tests of the ops; `table.py` prints what was found.
"""
