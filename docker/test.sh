#!/usr/bin/env bash
# `make docker-test`: builds the CPU image with buildah on a base made by debootstrap, and trains configs/debug.yaml in it.
# How this machine reaches its package mirrors (pip's and apt's configuration) is read from it and passed to the build only.
#   BASE                   an image to build on, as `buildah pull` takes it (oci-archive:FILE, ...), instead of debootstrap's
#   DOCKER_TEST_BUILD_ARGS more options for `buildah build`, such as --volume /etc/ssl/certs:/etc/ssl/certs:ro
#   DOCKER_TEST_KEEP=1     leaves the working folder, with the image in it
set -euo pipefail
cd "$(dirname "$0")/.."

SUITE=bookworm
NEEDED_GB=8
BASE_IMAGE=localhost/llmtrain-base:test
IMAGE=localhost/llmtrain:cpu
PYTHON=${PYTHON:-python3}

refuse() { printf 'docker-test: %s\n' "$1" >&2; exit 2; }

for tool in buildah debootstrap; do
    command -v "$tool" >/dev/null || refuse "$tool is missing: apt-get install --no-install-recommends buildah debootstrap"
done
[ "$(id -u)" -eq 0 ] || refuse "debootstrap and buildah's chroot isolation need root, this is $(id -un)"
FOLDER=${TMPDIR:-/var/tmp}
free_gb=$(($(df --output=avail -k "$FOLDER" | tail -n 1) / 1048576))
[ "$free_gb" -ge "$NEEDED_GB" ] || refuse "$FOLDER has $free_gb GB free, $NEEDED_GB are needed: set TMPDIR to a larger disk"
WORK=$(mktemp -d "$FOLDER/llmtrain-docker-test.XXXXXX")
mkdir "$WORK/tmp" "$WORK/run"
export TMPDIR=$WORK/tmp BUILDAH_ISOLATION=chroot
store() { local verb=$1; shift; buildah --root "$WORK/storage" --runroot "$WORK/run" --storage-driver vfs "$verb" "$@"; }

clean_up() {
    store rm --all >/dev/null 2>&1 || true  # also unmounts
    if [ -n "${DOCKER_TEST_KEEP:-}" ]; then
        echo "docker-test: kept $WORK"
    else
        rm -rf --one-file-system "$WORK"
    fi
}
trap clean_up EXIT

# Runs one step with its output in a file; a step that fails is named with what refused it.
step() {
    local name=$1 status log=$WORK/step.log start=$SECONDS
    shift
    # Not `"$@" || status=$?`: on the left of || a function goes on after a command that failed.
    set +e
    (set -e; "$@") >"$log" 2>&1
    status=$?
    set -e
    if [ "$status" -ne 0 ]; then
        printf 'docker-test: FAILED at "%s" (exit %s): %s\nIts last lines:\n' "$name" "$status" "$*" >&2
        tail -n 25 "$log" | sed 's/^/    /' >&2
        exit 1
    fi
    printf 'docker-test: %-38s %4d s\n' "$name" "$((SECONDS - start))"
}

make_base() {
    local container root mirror
    container=$(store from scratch)
    root=$(store mount "$container")
    # The mirror that this machine's apt uses for the suite, if it has one; else debootstrap's own.
    # shellcheck disable=SC2016  # a field for apt to fill in, not a variable
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $SUITE" | head -n 1)
    debootstrap --variant=minbase "$SUITE" "$root" ${mirror:+"$mirror"} || {
        tail -n 5 "$root/debootstrap/debootstrap.log"
        return 1
    }
    store umount "$container"
    store commit --rm "$container" "$BASE_IMAGE"
}

pull_base() {
    local id
    id=$(store pull --quiet "$BASE")
    store tag "$id" "$BASE_IMAGE"
}

host_configuration() {
    "$PYTHON" docker/host_pip.py "$WORK/pip.conf" >"$WORK/volumes"
    apt-config dump --format '%F "%v";%n' Acquire::http Acquire::https Acquire::Check-Valid-Until Acquire::Check-Date \
        >"$WORK/apt.conf"
}

build() {
    local volumes
    mapfile -t volumes <"$WORK/volumes"
    # shellcheck disable=SC2086  # DOCKER_TEST_BUILD_ARGS holds several words
    store build --network host --file docker/Dockerfile --tag "$IMAGE" \
        --build-arg BASE="$BASE_IMAGE" --build-arg TORCH_INDEX= --secret id=pip.conf,src="$WORK/pip.conf" \
        --volume "$WORK/apt.conf:/etc/apt/apt.conf.d/99host:ro" "${volumes[@]}" ${DOCKER_TEST_BUILD_ARGS:-} .
}

inside() { store run --network host --volume "$WORK/data:/llmtrain/data" "$CONTAINER" -- "$@"; }

two_nodes() {
    local port rank node nodes=() status=0
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    for rank in 0 1; do
        inside env OMP_NUM_THREADS=1 LAUNCH=cpu-ddp PROCESSES_PER_NODE=1 \
            NNODES=2 NODE_RANK="$rank" MASTER_ADDR=127.0.0.1 MASTER_PORT="$port" \
            timeout 300 docker/launch.sh --config configs/debug.yaml run.dir=checkpoints/two training.max_steps=10 &
        nodes+=($!)
    done
    for node in "${nodes[@]}"; do wait "$node" || status=$?; done
    return "$status"
}

if [ -n "${BASE:-}" ]; then
    step "base $BASE" pull_base
else
    step "base ($SUITE, debootstrap)" make_base
fi
step "configuration of pip and apt" host_configuration
step "build the CPU image" build
CONTAINER=$(store from --pull-never "$IMAGE")
install -d -m 1777 "$WORK/data"
# shellcheck disable=SC2016  # expands in the container
step "the user in the image is not root" inside bash -c '[ "$(id -u)" -ne 0 ] && ! touch /llmtrain/pyproject.toml'
step "llmtrain prepare" inside llmtrain prepare --input stdlib --max-files 200 --tokenizer char --out data/stdlib
step "train configs/debug.yaml" inside llmtrain train --config configs/debug.yaml
step "verify what was written" inside llmtrain verify checkpoints/debug
step "two nodes, docker/launch.sh" two_nodes
inside python - <<'EOF'
import json, sys, torch

loss = json.load(open("checkpoints/debug/training_metrics.json"))["train_loss"]
print(f"docker-test: torch {torch.__version__}; train loss {loss[0]:.3f} -> {loss[-1]:.3f}")
sys.exit(0 if loss[-1] < loss[0] - 0.5 else "docker-test: FAILED: the loss did not fall by half a nat")
EOF
du -sh "$WORK/storage" | sed 's/^\(\S*\).*/docker-test: passed; \1 of disk while it ran/'
