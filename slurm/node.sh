#!/usr/bin/env bash
# Runs once on each node of a job, started by srun: one `accelerate launch`, which starts the processes of this node.
# Arguments: MODULE and its arguments. What SLURM_NODEID is differs from node to node, so it is read here.
set -euo pipefail

if [[ -n $LLMTRAIN_MODULES ]]; then
    read -r -a modules <<< "$LLMTRAIN_MODULES"
    module load "${modules[@]}"
fi
read -r -a container <<< "$LLMTRAIN_CONTAINER"
if (( ! ${#container[@]} )); then
    [[ -z $LLMTRAIN_VENV ]] || PATH="$(realpath -m "$LLMTRAIN_VENV")/bin:$PATH"
    command -v accelerate > /dev/null || {
        echo "llmtrain: error: no accelerate on node $SLURMD_NODENAME: is LLMTRAIN_VENV=$LLMTRAIN_VENV there?" >&2
        exit 2
    }
fi

# Slurm signals all processes of the job. The ranks of a training have a handler, which saves; the launchers above them
# must neither die nor kill the ranks (torchrun does, after 30 s). A signal that is ignored here stays ignored in what is
# started from here; a container's runtime may reset that, hence once more inside.
ignore=:
[[ $1 != llmtrain.train ]] || ignore='trap "" USR1 TERM'
eval "$ignore"
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
# Lines of all ranks in one log say whose they are.
# shellcheck disable=SC2016  # torchrun fills it in
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '

logs=$LLMTRAIN_LOGS/node-$SLURM_NODEID
mkdir -p "$logs"
# `accelerate launch` answers 1 to every end but 0, so the first process of each node leaves its exit code here.
LLMTRAIN_EXIT_CODE_FILE=$(realpath "$logs")/exit-code
export LLMTRAIN_EXIT_CODE_FILE
rm -f "$LLMTRAIN_EXIT_CODE_FILE" "$logs/failure"

launch=(
    accelerate launch --config_file "$LLMTRAIN_LAUNCH_FILE"
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID"
    --num_processes $(( SLURM_NNODES * LLMTRAIN_PROCESSES_PER_NODE ))
    --main_process_ip "$LLMTRAIN_MAIN_ADDRESS" --main_process_port "$LLMTRAIN_MAIN_PORT" --same_network
    --deepspeed_multinode_launcher standard  # the others want ssh or pdsh
    --tee 3 --log_dir "$logs"
)
status=0
{
    # A container may begin in a folder of its own; relative paths are of this one.
    "${container[@]}" bash -c "cd \"\$1\" && shift && $ignore; exec \"\$@\"" node.sh "$PWD" "${launch[@]}" -m "$@" 2>&1 >&3 |
        tee "$logs/launcher.log" >&2
} 3>&1 || status=$?

code=$status
[[ ! -s $LLMTRAIN_EXIT_CODE_FILE ]] || read -r code < "$LLMTRAIN_EXIT_CODE_FILE"
# Told to stop, and saved. To srun that is no failure: it would kill the other nodes, which may not be done yet.
if (( code == 75 )); then
    : > "$logs/failure"  # a node that failed need not wait for this one
    exit 0
fi
# Which rank of this node failed first, out of torchrun's report; slurm/train.sh finds the first of all nodes.
awk -v node="$SLURMD_NODENAME" '
    /^Root Cause/ { found = 1 }
    found && $1 == "time" { time = $3 }
    found && $1 == "rank" { rank = $3 }
    found && $1 == "exitcode" { print time, "rank", rank, "on node", node ", exit code", $3 ($6 ? " " $6 : ""); exit }
' "$logs/launcher.log" > "$logs/failure.tmp"
mv "$logs/failure.tmp" "$logs/failure"
(( code != 0 )) || code=$status
(( code != 0 )) || exit 0
# srun kills the other nodes as soon as this one is gone. Their ranks first get a moment to notice, and to say what they saw.
for (( tries = 20; tries > 0; tries-- )); do
    ended=("$LLMTRAIN_LOGS"/node-*/failure)
    (( ${#ended[@]} < SLURM_NNODES )) || break
    sleep 1
done
exit "$code"
