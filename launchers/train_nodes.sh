#!/usr/bin/env bash
# Trains on several hosts: the same command on each, only --node-rank differs. Started again, it resumes.
# Usage: train_nodes.sh CONFIG.yaml --nodes N --node-rank R --address HOST[:PORT] [--processes P] [--interface IFACE]
#                       [--wait SECONDS] [--cpu] [--log-dir FOLDER] [key.path=value ...]
#   --nodes N           how many hosts; with fewer the run does not start
#   --node-rank R       which of them this one is, from 0 to N - 1
#   --address HOST      a name or IPv4 address of node 0 that every host reaches, with the port (default: 29500) that
#                       hosts and processes meet at; between them they connect on ports of the system's choice
#   --processes P       per host (default: one per visible GPU; more than there are GPUs is an error)
#   --interface IFACE   the network interface for NCCL and gloo, such as eth0 or ib0
#   --wait SECONDS      how long to wait for the other hosts (default: 600)
#   --cpu               on the CPU; needs --processes
#   --log-dir FOLDER    what each process of this host says also goes into a file of its own there
#   key.path=value      settings that change the config for this run
# SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C on one host: all processes save and end, exit status 75 on every host.
# All hosts must see the same run folder (run.folder) and read the same data.
# Relative paths start from the current directory, those in the config too.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

DEFAULT_PORT=29500

nodes="" node_rank="" address="" processes="" interface="" wait=600 log_dir=""
read_arguments "--nodes --node-rank --address --processes --interface --wait --log-dir" "$@"
for option in nodes node_rank address; do
    [[ -n "${!option}" ]] || refuse "--${option//_/-} is needed"
done
require_number --nodes "$nodes" 1
require_number --node-rank "$node_rank" 0
((node_rank < nodes)) || refuse "--node-rank $node_rank: with --nodes $nodes, ranks are 0 to $((nodes - 1))"
require_number --wait "$wait" 1
[[ "$address" =~ ^([A-Za-z0-9._-]+)(:([1-9][0-9]{0,4}))?$ ]] || refuse "--address '$address' is not HOST or HOST:PORT"
host="${BASH_REMATCH[1]}" port="${BASH_REMATCH[3]:-$DEFAULT_PORT}"
((port < 65536)) || refuse "--address '$address': ports are 1 to 65535"

prepare_environment
choose_processes
set_run_environment
if [[ -n "$interface" ]]; then
    set_interface "$interface"
fi

# Refuses wrong settings and impossible layouts before any process starts.
total=$((nodes * processes))
training=("$config" ${overrides[@]+"${overrides[@]}"} --world "$total")
"$PYTHON_IN_VENV" -m titans_train check "${training[@]}"
plan="$("$PYTHON_IN_VENV" -m titans_train plan "${training[@]}" --json)"
digest="$(cksum <<<"$plan")"

say "node $node_rank of $nodes: meeting the others at $host:$port (for $wait s at most)"
"$PYTHON_IN_VENV" "$ROOT/launchers/meet.py" "$nodes" "$node_rank" "$host" "$port" "$wait" \
    "--nodes=$nodes" "--processes=$processes" "the config's checksum=${digest// /-}"

say "training $config on $total ${cpu:+CPU }processes, $processes per node"
exec "$PYTHON_IN_VENV" "$ROOT/launchers/ranks.py" --processes "$processes" --nodes "$nodes" --node-rank "$node_rank" \
    --address "$host" --port "$port" ${log_dir:+--log-dir "$log_dir"} -- \
    "$PYTHON_IN_VENV" -m titans_train train "${training[@]}"
