#!/usr/bin/env bash
# Trains on this host; started again, it resumes from the last complete checkpoint.
# Usage: train.sh CONFIG.yaml [--processes N] [--cpu] [--log-dir FOLDER] [key.path=value ...]
#   --processes N     how many (default: one per visible GPU; more than there are GPUs is an error)
#   --cpu             on the CPU; needs --processes
#   --log-dir FOLDER  what each process says also goes into a file of its own there
#   key.path=value    settings that change the config for this run
# SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C: every process saves and ends, exit status 75. Others: 0 finished, 2 refused.
# Relative paths start from the current directory, those in the config too.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

processes="" log_dir=""
read_arguments "--processes --log-dir" "$@"
prepare_environment
choose_processes
set_run_environment

# Refuses wrong settings and impossible layouts before any process starts.
training=("$config" ${overrides[@]+"${overrides[@]}"} --world "$processes")
"$PYTHON_IN_VENV" -m titans_train check "${training[@]}"

say "training $config on $processes ${cpu:+CPU }processes"
exec "$PYTHON_IN_VENV" "$ROOT/launchers/ranks.py" --processes "$processes" ${log_dir:+--log-dir "$log_dir"} -- \
    "$PYTHON_IN_VENV" -m titans_train train "${training[@]}"
