"""The only place that knows ranks and groups: the mesh, the process group, the adapter to DeepSpeed.

Models and memory never import from here; training does, through `Mesh`, `process_group`, `agree` and `Engine`.
"""

from titans_train.parallel.engine import Engine
from titans_train.parallel.launch import agree, gather, process_group, sum_over_ranks
from titans_train.parallel.mesh import Mesh

__all__ = ["Engine", "Mesh", "agree", "gather", "process_group", "sum_over_ranks"]
