"""Stands in for the trainer where the judge of the fault table is tested: trains wrong, on demand.

Usage: trainer.py RUN WHAT. Six steps, a checkpoint after the third. WHAT: dies (after the fourth step, once), loss,
tokens, partial (goes on from a checkpoint that is not whole), stays (a process), refuses, good.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

STEPS, SAVED = 6, 3


def main(run: Path, what: str) -> int:
    saved = run / "checkpoints" / f"step-{SAVED:08d}" / "rank-00000.safetensors"
    first = SAVED if saved.exists() else 0
    metrics, again = run / "metrics.jsonl", run.exists()
    run.mkdir(parents=True, exist_ok=True)
    if what == "refuses":
        print("error: no", flush=True)
        return 2
    kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= first] if again else []
    metrics.write_text("".join(f"{line}\n" for line in kept))
    for step in range(first + 1, STEPS + 1):
        loss = 1 / step + (1e-12 if what == "loss" and again and step == 5 else 0)
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss, "grad_norm": 1.0}) + "\n")
        print(f"step {step}/{STEPS}  loss {loss:.4f}", flush=True)
        if step == SAVED:
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_bytes(b"half" if what == "partial" else b"whole")
        if step == SAVED + 1 and not again and what != "good":
            if what == "stays":
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
            os.kill(os.getpid(), signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
