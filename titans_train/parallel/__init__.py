"""The only place that knows ranks and groups: mesh, groups, the adapters to DeepSpeed and megatron-core; the links
between sequence shards (links.py, shards.py) and the memory's scan over them (wavefront.py, affine_scan.py).

Models and memory never import from here; training does, through `Mesh`, `process_group`, `agree` and `Engine`.
"""

from titans_train.parallel.engine import Engine
from titans_train.parallel.launch import agree, gather, mean_over_ranks, mesh_of, process_group, sum_over_data
from titans_train.parallel.mesh import Mesh
from titans_train.parallel.tensor import make_parts

__all__ = [
    "Engine",
    "Mesh",
    "agree",
    "gather",
    "make_parts",
    "mean_over_ranks",
    "mesh_of",
    "process_group",
    "sum_over_data",
]
