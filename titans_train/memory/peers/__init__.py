"""Update rules of other papers, for comparisons: DeltaNet, Gated DeltaNet, Mamba2, RWKV-7 (layer.py).

All are one linear recurrence of a matrix: recurrence.py is its definition, scan.py its chunked form.
"""
