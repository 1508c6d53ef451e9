#!/usr/bin/env bash
# From nothing to a trained Titans model: installs, prepares text, trains, evaluates, prints a sample.
# Usage: quickstart.sh [key.path=value ...]    the settings change configs/quickstart.yaml for this run
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

CONFIG=configs/quickstart.yaml
CORPUS=data/stdlib-bytes

for setting in "$@"; do
    case "$setting" in
        -h | --help)
            sed -n '2,3s/^# //p' -- "${BASH_SOURCE[0]}"
            exit 0
            ;;
        [a-z]*.*=*) ;;
        *) fail "'$setting' is no setting; write key.path=value, such as training.steps=100" ;;
    esac
done

cd -- "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
prepare_environment

# One GPU serves one process; without a GPU, two processes share the CPU.
processes="$("$PYTHON_IN_VENV" -c 'import torch; print(min(torch.cuda.device_count() or 2, 2))')"
"$PYTHON_IN_VENV" -m titans_train check "$CONFIG" "$@" --world "$processes" # refuses wrong settings at once

if [[ -f "$CORPUS/manifest.json" ]]; then
    say "text: $CORPUS is there"
else
    say "text: the source and text files of Python's standard library, into $CORPUS"
    "$PYTHON_IN_VENV" -m data_prep --default-corpus --output "$CORPUS"
fi

say "training $CONFIG on $processes processes"
"$PYTHON_IN_VENV" launchers/ranks.py --processes "$processes" -- \
    "$PYTHON_IN_VENV" -m titans_train train "$CONFIG" "$@" ||
    fail "training stopped, its own message is above. Starting again resumes from the last checkpoint"

say "evaluating the last checkpoint"
"$PYTHON_IN_VENV" -m titans_train evaluate "$CONFIG" --sequences 128 "$@"

say "a sample"
"$PYTHON_IN_VENV" -m titans_train generate "$CONFIG" --prompt "def " "$@"

results="$("$PYTHON_IN_VENV" -c '
import sys
from titans_train.config import load_config
run = load_config(sys.argv[1], sys.argv[2:]).run
print(f"{run.folder}/{run.name}")' "$CONFIG" "$@")"
say "results: $ROOT/$results (summary.json, loss.png, metrics.jsonl, checkpoints)"
say "curves:  $PYTHON_IN_VENV -m tensorboard.main --logdir '$ROOT/$results'"
