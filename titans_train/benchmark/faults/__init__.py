"""`benchmark faults`: a run is struck in every way that happens to runs, and has to finish as if nothing had been.

Each fault is injected from outside into a real training of a tiny model on two processes. Then the same command is
given again until the run is finished. It has *survived* if every loss, gradient norm and validation loss of the run is
bit for bit the uninterrupted run's, and what a row promises beside it held. Steps lost: trained a second time. Time to
detect: from the fault until no process of the job is left, or until the line that names it.
"""

from __future__ import annotations

from titans_train.benchmark.faults.command import main

__all__ = ["main"]
