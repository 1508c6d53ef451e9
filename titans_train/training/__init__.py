"""Training: the loop, one step, the optimiser and its schedule, checkpoints, the run folder.

Start reading at loop.py.
"""
