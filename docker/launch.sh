#!/usr/bin/env bash
# One node's share of a launch; on several nodes it is started once on each.
# usage: docker/launch.sh --config configs/124m.yaml [key=value...]
#   LAUNCH              file in launch/, without .yaml (ddp)
#   PROCESSES_PER_NODE  one for each visible GPU
#   NNODES, NODE_RANK   number of nodes (1), which of them this is, from 0 (0)
#   MASTER_ADDR         address of node 0, needed where NNODES > 1
#   MASTER_PORT         a free port there (29500)
set -euo pipefail

refuse() { echo "docker/launch.sh: $1" >&2; exit 2; }
number() { [[ "${!1}" =~ ^[0-9]{1,6}$ ]] || refuse "$1=${!1}: a whole number is wanted"; }

: "${LAUNCH:=ddp}" "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=}" "${MASTER_PORT:=29500}"
if [ -z "${PROCESSES_PER_NODE:-}" ]; then
    PROCESSES_PER_NODE=$(python -c 'import torch; print(torch.cuda.device_count())')
    [ "$PROCESSES_PER_NODE" -gt 0 ] || refuse "no GPU is visible: give the container GPUs (--gpus all), or set PROCESSES_PER_NODE for a CPU launch"
fi
for name in NNODES NODE_RANK MASTER_PORT PROCESSES_PER_NODE; do number "$name"; done
[ "$PROCESSES_PER_NODE" -gt 0 ] || refuse "PROCESSES_PER_NODE=0: at least one process is needed"
[ "$NODE_RANK" -lt "$NNODES" ] || refuse "NODE_RANK=$NODE_RANK with NNODES=$NNODES: ranks count from 0 to $((NNODES - 1))"
[ -f "launch/$LAUNCH.yaml" ] || refuse "launch/$LAUNCH.yaml does not exist; LAUNCH is one of: $(cd launch && echo *.yaml | sed 's/\.yaml//g')"

rendezvous=()
if [ "$NNODES" -gt 1 ]; then
    [ -n "$MASTER_ADDR" ] || refuse "NNODES=$NNODES needs MASTER_ADDR, the address of node 0"
    # Without the standard launcher a DeepSpeed launch file would look for pdsh.
    rendezvous=(--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"
                --deepspeed_multinode_launcher standard)
fi
# When told to stop, torchrun would kill its ranks after 30 s; saving a large model takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
exec accelerate launch --config_file "launch/$LAUNCH.yaml" \
    --num_machines "$NNODES" --machine_rank "$NODE_RANK" --num_processes "$((NNODES * PROCESSES_PER_NODE))" \
    "${rendezvous[@]}" -m llmtrain.train "$@"
