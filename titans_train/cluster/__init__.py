"""Clusters that SLURM schedules: `submit` hands a job in (imports no torch), `preflight` looks at its nodes first.

The job files are in slurm/, beside this package.
"""
