#!/usr/bin/env bash
# Train one config on all workers of a TPU slice (TPU VMs), from a workstation:
#
#   TPU=my-slice ZONE=us-east5-a \
#     experiments/launch/tpu_vm.sh experiments/switch.py:medium --config.mesh.expert=8
#
# The slice exists, this repository is in ~/moejax on each worker with `pip install -e ".[tpu]"`, and
# a bucket is mounted there at ~/runs (gcsfuse), since every worker must see the working directory.
# Preempted or cut off: create the slice again and give the same command; the run resumes.
set -euo pipefail

: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}"
experiment=${1:?usage: tpu_vm.sh experiments/FILE.py:SCALE [--config.KEY=VALUE ...]}
shift
name=${RUN:-$(basename "${experiment%%.py*}")-${experiment##*:}}

command=(moejax train "$experiment" --workdir="runs/$name" "$@")

# The workers compile the same program: one cache for all of them and for the next attempt.
remote="cd ~/moejax && mkdir -p ~/runs && ln -sfn ~/runs runs"
remote+=" && JAX_COMPILATION_CACHE_DIR=\$HOME/runs/compiled exec $(printf '%q ' "${command[@]}")"

if [[ ${DRY_RUN:-} ]]; then
  printf '%s\n' "$remote"
  exit
fi
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$remote"
