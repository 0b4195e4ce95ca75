#!/usr/bin/env bash
# Runs in a batch script's allocation: starts slurm/node.sh once on each node, and requeues the job where it was told
# to stop before it was done. Arguments: CONFIG [key=value …], as for `llmtrain train`.
set -euo pipefail

say() { echo "slurm/train.sh: $*" >&2; }
refuse() { echo "llmtrain: error: $*" >&2; exit 2; }

# shellcheck source-path=SCRIPTDIR source=site.env
source slurm/site.env

(( $# )) || refuse "no config: sbatch … slurm/multi-node.sbatch configs/FILE.yaml [key=value …]"
[[ -f $1 ]] || refuse "$1: no such config file in $PWD"
# That ends every launch with "run me again", which here would never end.
if [[ " $* " == *" training.stop_after="* ]] || grep -Eq '^[^#]*stop_after:[[:space:]]*[0-9]' "$1"; then
    refuse "training.stop_after and a job that requeues itself contradict each other; leave it out"
fi

if [[ -z $LLMTRAIN_LAUNCH_FILE ]]; then
    LLMTRAIN_LAUNCH_FILE=launch/ddp.yaml
    (( SLURM_NNODES == 1 )) || LLMTRAIN_LAUNCH_FILE=launch/multi-node-zero3.yaml
fi
[[ -f $LLMTRAIN_LAUNCH_FILE ]] || refuse "LLMTRAIN_LAUNCH_FILE=$LLMTRAIN_LAUNCH_FILE: no such file in $PWD"

# What was asked for ("8", "h100:8") comes first: an exclusive job owns all GPUs of a node, but srun shows only these.
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
: "${LLMTRAIN_PROCESSES_PER_NODE:=${gpus##*:}}"
[[ $LLMTRAIN_PROCESSES_PER_NODE =~ ^[1-9][0-9]*$ ]] || refuse "this job has no GPUs: add --gpus-per-node=N to sbatch," \
    "or, on CPU nodes, set LLMTRAIN_PROCESSES_PER_NODE (is '$LLMTRAIN_PROCESSES_PER_NODE')"

# The first node has machine rank 0 and listens. Its NodeAddr is how Slurm itself reaches it; a node's name need not resolve.
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
: "${LLMTRAIN_MAIN_ADDRESS:=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}"
: "${LLMTRAIN_MAIN_PORT:=$(( 15000 + (SLURM_JOB_ID + 997 * ${SLURM_RESTART_COUNT:-0}) % 15000 ))}"

LLMTRAIN_LOGS=$LLMTRAIN_LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID
mkdir -p "$LLMTRAIN_LOGS"
rm -f "$LLMTRAIN_LOGS"/node-*/{exit-code,failure}
export LLMTRAIN_LAUNCH_FILE LLMTRAIN_PROCESSES_PER_NODE LLMTRAIN_MAIN_ADDRESS LLMTRAIN_MAIN_PORT LLMTRAIN_LOGS

# Slurm signals this shell too when the time is over or the job has to give way; it must live to say what happens next.
trap : TERM USR1

say "job $SLURM_JOB_ID, start $(( ${SLURM_RESTART_COUNT:-0} + 1 )): $LLMTRAIN_LAUNCH_FILE, $SLURM_NNODES nodes" \
    "($SLURM_JOB_NODELIST) of $LLMTRAIN_PROCESSES_PER_NODE processes, rendezvous at" \
    "$LLMTRAIN_MAIN_ADDRESS:$LLMTRAIN_MAIN_PORT, logs of ranks in $LLMTRAIN_LOGS"
read -r -a options <<< "$LLMTRAIN_SRUN_OPTIONS"
# Since Slurm 22.05 srun does not take this over from sbatch; without it a task gets all CPUs of the allocation.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
# One task here is a launcher and all its processes: Slurm must not pin them to the cores of one.
status=0
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    "${options[@]}" bash slurm/node.sh llmtrain.train --config "$@" || status=$?

# 75 (told to stop, and saved) is no failure to srun; rank 0, which is on the first node, says it.
code=$status
if [[ -s $LLMTRAIN_LOGS/node-0/exit-code ]]; then
    read -r code < "$LLMTRAIN_LOGS/node-0/exit-code"
    (( code == 75 )) || code=$status
fi
if (( code != 75 )); then
    if (( code != 0 )); then
        say "failed with exit code $code; not requeued"
        # Code 5 says that another rank was lost: the first cause is one that ended in another way, if there is one.
        failures=$(find "$LLMTRAIN_LOGS" -path '*/node-*/failure' -exec sort {} +)
        if read -r failure < <(grep -v 'exit code 5$' <<< "$failures" || head -n 1 <<< "$failures"); then
            say "first to fail: $failure"
        fi
    fi
    exit "$code"
fi

# Still running: the signal before the time limit, or a preemption that gives time. Time limit: that signal came too early
# for the ranks, and they obeyed the last one. Anything else is scancel, which is meant for good, or a preemption in which
# Slurm requeues by itself.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r')
case $state in
    RUNNING* | *' TimeLimit') ;;
    *) say "told to stop, and saved; the job is ended from outside ($state): not requeued here"; exit 75 ;;
esac
if (( ${SLURM_RESTART_COUNT:-0} >= LLMTRAIN_MAX_REQUEUES )); then
    say "told to stop, and saved; not requeued after $SLURM_RESTART_COUNT times (LLMTRAIN_MAX_REQUEUES)"
    exit 75
fi
say "told to stop, and saved; back to the queue"
scontrol requeue "$SLURM_JOB_ID" || { say "the job may not be requeued; the same sbatch command goes on"; exit 75; }
