"""Preparing: text files in, verified token shards out. Runs on a machine without a GPU.

`python -m data_prep --help` is the entry; `manifest.py` is the contract with the reading side.
"""
