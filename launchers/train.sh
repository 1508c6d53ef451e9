#!/usr/bin/env bash
# Trains on this host; started again, it resumes from the last complete checkpoint.
# Usage: train.sh CONFIG.yaml [--processes N] [--cpu] [key.path=value ...]
#   --processes N     how many (default: one per visible GPU; more than there are GPUs is an error)
#   --cpu             on the CPU; needs --processes
#   key.path=value    settings that change the config for this run
# Relative paths start from the current directory, those in the config too.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

processes=""
read_arguments "--processes" "$@"
prepare_environment
choose_processes
set_run_environment

# Refuses wrong settings and impossible layouts before any process starts.
training=("$config" ${overrides[@]+"${overrides[@]}"} --world "$processes")
"$PYTHON_IN_VENV" -m titans_train check "${training[@]}"

say "training $config on $processes ${cpu:+CPU }processes"
exec "$PYTHON_IN_VENV" -m torch.distributed.run --standalone --local-addr 127.0.0.1 \
    --nproc-per-node "$processes" --max-restarts 0 -m titans_train train "${training[@]}"
