"""`benchmark ablations`: Titans' parts taken away one by one, and other papers' models, trained alike and compared.

variants.py says what is trained, run.py trains and evaluates one, command.py all of them, report.py makes table and
pictures. The tasks and variants are in configs/ablations/.
"""

from titans_train.benchmark.ablations.command import main

__all__ = ["main"]
