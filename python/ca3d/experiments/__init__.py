"""Grids of training runs, and the studies made of them.

`cells` says what a run is, `runner` runs a grid of them and can be killed at any moment,
`statistics` says how sure a figure is. The rest are the studies: each plans its cells, and writes
its report from the rows that the runs left.
"""
