"""Preparing: text files in, verified token shards out. Runs on a machine without a GPU.

`python -m data_prep --help` is the entry; `manifest.py` is the contract with the reading side.

    sources.py   files -> units                  units.py    a unit -> tokens and a table of its documents
    readers.py   a unit -> documents             arrange.py  tables -> duplicates, splits, shard borders
    prepare.py   the three steps, in order       shards.py   tokens -> one shard
    work.py      what a stopped run has done     output.py   the finished folder in its place
    claim.py     whose an S3 output is           bad.py      records that are no document

A unit and a shard are each one process's piece of work (pool.py), whole or absent (durable.py), and a function of the
input and the settings alone; so the number of workers and any kill on the way leave no trace in the result.
"""
