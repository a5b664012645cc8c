"""`python -m benchmarks gpu`: the two visits to a GPU; README.md beside this file says how to use them.

`command.py` runs a visit step by step in a process that never touches the GPU; `children.py` has the cases done by
processes of their own (`child.py`) and survives those; `table.py` prints what they found. `smoke.py` and `timing.py`
hold the cases, `profile.py` runs ncu, `checks.py` the tests of the ops.
"""
