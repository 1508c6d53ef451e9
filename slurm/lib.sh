# Shared by the job files; sourced by each after it has set TITANS_ROOT. Bash 4, SLURM 20.11 or newer.
# shellcheck shell=bash
shopt -s nullglob

REQUEUE=75 # exit status of a program that says "start me again, I go on" (sysexits' EX_TEMPFAIL)
# SLURM_RESTART_COUNT may be the one of a job from which this one was submitted: SLURM knows.
RESTART="$(scontrol -o show job "$SLURM_JOB_ID" | grep -om1 ' Restarts=[0-9]*')"
RESTART="${RESTART#*=}"
RESTART="${RESTART:-${SLURM_RESTART_COUNT:-0}}"
MAX_RESTARTS="${MAX_RESTARTS:-20}"
END_SECONDS="${END_SECONDS:-300}"
NAME="$SLURM_JOB_NAME-$SLURM_JOB_ID"
LOG_DIR="${LOG_DIR:-logs}"
[[ "$LOG_DIR" == /* ]] || LOG_DIR="$PWD/$LOG_DIR"
LOG_DIR="$LOG_DIR/$NAME" # jobs may share the folder above
NOTES="$LOG_DIR/.restart-$RESTART" # what rank.py leaves for this script

say() { printf '%s\n' "$(date +%FT%T) [$NAME, restart $RESTART] $*"; }

# refuse MESSAGE: what a new start would not mend.
refuse() {
    say "error: $*" >&2
    exit 2
}

# number NAME LEAST MOST: the variable's value is that, in digits; 08 is 8.
number() {
    if [[ "${!1}" =~ ^[0-9]{1,9}$ ]]; then
        printf -v "$1" %d "$((10#${!1}))"
        ((${!1} < $2 || ${!1} > $3)) || return 0
    fi
    refuse "$1 is '${!1}'; it is a number from $2 to $3"
}

# Sets STEP, the srun options of every step, and PYTHON. Exactly one of VENV, PYTHON and CONTAINER_IMAGE is needed.
prepare_job() {
    local given=0 each
    for each in VENV PYTHON CONTAINER_IMAGE; do
        [[ -z "${!each:-}" ]] || given=$((given + 1))
    done
    ((given == 1)) || refuse "set exactly one of VENV (a virtual environment), PYTHON (an interpreter) and" \
        "CONTAINER_IMAGE; $given of them are set"
    number MAX_RESTARTS 0 999999999
    number END_SECONDS 1 999999999
    ((RESTART <= MAX_RESTARTS)) || refuse "SLURM has started this job again, but it had its MAX_RESTARTS=$MAX_RESTARTS" \
        "restarts; look for what ends it, then submit it again: it goes on where it was"
    mkdir -p -- "$LOG_DIR" || refuse "the folder for logs cannot be made; set LOG_DIR to one that every node sees"
    STEP=(srun --export=ALL) # without it, sbatch --export=NONE would leave the tasks without PATH
    if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
        use_container
    else
        PYTHON="${PYTHON:-$VENV/bin/python}"
        [[ -x "$PYTHON" ]] || refuse "there is no Python at $PYTHON on $(hostname); set VENV or PYTHON"
    fi
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun 22.05 and newer does not inherit it
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    export PYTHONPATH="$TITANS_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    export REQUEUE RESTART LOG_DIR NOTES LOGGED="" SLURM_RESTART_COUNT="$RESTART"
}

# pyxis: an image of enroot's kind; the project, the working directory and the logs are mounted where they are.
use_container() {
    srun --help | grep -q -- --container-image || refuse "CONTAINER_IMAGE is set, but this cluster's srun has no" \
        "--container-image (the pyxis plugin); set VENV or PYTHON instead"
    local mounts="$TITANS_ROOT:$TITANS_ROOT,$PWD:$PWD,$LOG_DIR:$LOG_DIR"
    PYTHON="${CONTAINER_PYTHON:-python3}"
    STEP+=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$PWD"
        "--container-mounts=$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
}

# Where ranks meet: the first node, by name or by SLURM's address, and a port that follows from the job's number.
choose_meeting_place() {
    local first address
    first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    if ! getent hosts "$first" >/dev/null; then
        address="$(scontrol -o show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)"
        say "the name $first does not resolve; its address is $address, says SLURM"
        first="$address"
    fi
    export MASTER_ADDR="$first"
    export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" # below the ports of outgoing connections
    number MASTER_PORT 1 65535
}

# Signals that reach this script. USR1 and USR2 come before a limit (--signal, preemption) and are passed on; TERM means
# that SLURM ends the job: whether it starts again is then SLURM's decision.
relay_signals() {
    asked="" ending="" interrupted="" repeating=""
    trap 'interrupted=yes; relay USR1' USR1
    trap 'interrupted=yes; relay USR2' USR2
    trap 'interrupted=yes; ending=yes; say "TERM: SLURM ends this job"' TERM
}

# relay SIGNAL: to the processes of the steps, again and again: tasks that are just starting are not there yet.
# PASS_ON=SIGNAL: that one instead.
relay() {
    say "$1: every task is told to save and stop"
    [[ -z "$repeating" ]] || return 0
    asked=yes
    while scancel --signal="${PASS_ON:-$1}" "$SLURM_JOB_ID"; do sleep 10; done &
    repeating=$!
}

# run_step TASKS COMMAND ...: sets status, once COMMAND, an srun of rank.py, has ended. A signal that this script traps
# only interrupts `wait`, and bash may then forget a status: it is written down. srun's 0 alone proves nothing: it says so
# of some steps that could not be started.
run_step() {
    local tasks="$1" process
    shift
    rm -f -- "$NOTES"-*
    { "$@"; echo $? >"$NOTES-status"; } &
    process=$!
    while :; do
        interrupted=""
        wait "$process"
        status=$?
        [[ -n "$interrupted" ]] || break
    done
    [[ ! -s "$NOTES-status" ]] || status="$(<"$NOTES-status")"
    [[ -z "$repeating" ]] || kill "$repeating" 2>/dev/null
    read_notes "$tasks"
}

# The first task that ended badly decides the status: what it was and said is in the notes (rank.py).
read_notes() {
    local log
    all_ran "$1" || { ((status != 0)) || status=1; }
    if [[ -f "$NOTES-bad" ]]; then
        read -r status log <"$NOTES-bad"
        [[ "$status" != "$REQUEUE" ]] || log="" # it has only been asked to stop
        say "$(sed -n 2p "$NOTES-bad")${log:+; the last lines of $log:}"
        [[ -z "$log" ]] || tail -n 15 -- "$log"
    elif [[ "$status" == 0 && -f "$NOTES-requeue" ]]; then
        status=$REQUEUE
    elif [[ "$status" =~ ^(138|140|143)$ ]]; then # USR1, USR2 or TERM came before rank.py was there to mind it
        status=$REQUEUE
    fi
}

# all_ran TASKS: have all left the note of a good end? Asked where srun found none bad.
all_ran() {
    local attempt ran
    ((status == 0)) || return 0
    for attempt in {1..20}; do
        : >"$NOTES-look" # a folder that one changes is read anew: network file systems keep a folder's list for a while
        ran=("$NOTES-done-"*)
        ((${#ran[@]} < $1)) || return 0
        sleep 0.5
    done
    say "srun ended with 0, but only ${#ran[@]} of $1 tasks ran; what it said is above"
    return 1
}

# requeue REASON: this job from the start of its file, unless it has had its restarts. Does not return.
requeue() {
    [[ -z "$ending" ]] || exit "$status"
    if ((RESTART >= MAX_RESTARTS)); then
        say "$1, but this was restart $RESTART of at most MAX_RESTARTS=$MAX_RESTARTS; not started again"
        exit "$status"
    fi
    sleep 1 # if SLURM is ending the job, its TERM is on the way
    [[ -z "$ending" ]] || exit "$status"
    say "$1; started again (restart $((RESTART + 1)) of at most $MAX_RESTARTS)"
    scontrol requeue "$SLURM_JOB_ID" || refuse "SLURM does not requeue this job; was it submitted with --no-requeue?"
    sleep 300 # SLURM ends this script
    exit "$status"
}

# What SLURM says of those of the job's nodes that are gone.
lost_nodes() {
    scontrol -o show node "$SLURM_JOB_NODELIST" |
        grep -oE '^NodeName=[^ ]*|State=[^ ]*(\*|DOWN|NOT_RESPONDING)[^ ]*' | grep -B1 '^State='
}

# Do all nodes of the job start a task? After a crash, one that is gone may not have been missed yet. And a step may be
# refused while the last one is cleared away: one failure says nothing.
nodes_answer() {
    local attempt
    for attempt in {1..4}; do
        ((attempt == 1)) || sleep 5
        ! lost_nodes || return 1
        timeout -k 5 60 srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
            --ntasks-per-node=1 --overlap true >/dev/null 2>&1 && return 0
    done
    say "no task starts on all of $SLURM_JOB_NODELIST, after $attempt tries"
    return 1
}

# Before the training: goes on only if the step ended well and nobody has asked to stop.
go_on() {
    ((status != 0)) || [[ -z "$asked" ]] || status=$REQUEUE
    case "$status" in
        0) return 0 ;;
        "$REQUEUE") requeue "stopped before the training began" ;;
        2) exit 2 ;;
    esac
    [[ -n "$ending" ]] || nodes_answer || requeue "a node is lost"
    exit "$status"
}
