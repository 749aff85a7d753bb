#!/usr/bin/env bash
# Train one config on TPU slices of a GKE cluster, through xpk (pip install xpk):
#
#   CLUSTER=my-cluster IMAGE=gcr.io/my-project/moejax TPU_TYPE=v5p-128 STORAGE=runs \
#     experiments/launch/gke_xpk.sh experiments/switch.py:medium --config.mesh.expert=8
#
# IMAGE holds this repository in /moejax, installed with `pip install ".[tpu]"`. STORAGE is an xpk
# storage (a bucket) mounted at /runs, since every process must see the working directory.
# A preempted pod gets SIGTERM: all processes save and end. A pod that ends before the run is
# finished counts as failed, so that the job starts again and resumes, up to RESTARTS times. After
# that, delete the workload and give the same command.
set -euo pipefail

: "${CLUSTER:?name of the cluster}" "${IMAGE:?docker image}" "${TPU_TYPE:?e.g. v5p-128}"
: "${STORAGE:?name of the xpk storage mounted at /runs}"
experiment=${1:?usage: gke_xpk.sh experiments/FILE.py:SCALE [--config.KEY=VALUE ...]}
shift
name=${RUN:-$(basename "${experiment%%.py*}")-${experiment##*:}}

command=(moejax train "$experiment" --workdir="/runs/$name" "$@")

# The shell hands SIGTERM on, and waits again for what it interrupts.
remote="cd /moejax; export JAX_COMPILATION_CACHE_DIR=/runs/compiled; "
remote+="trap 'kill -TERM \$!' TERM; $(printf '%q ' "${command[@]}")& "
remote+="wait \$! || wait \$! && test -e /runs/$name/summary.json"

if [[ ${DRY_RUN:-} ]]; then
  printf '%s\n' "$remote"
  exit
fi
exec xpk workload create \
  --cluster="$CLUSTER" \
  --workload="${name//_/-}" \
  --docker-image="$IMAGE" \
  --tpu-type="$TPU_TYPE" \
  --num-slices="${SLICES:-1}" \
  --storage="$STORAGE" \
  --max-restarts="${RESTARTS:-20}" \
  --termination-grace-period-seconds=120 \
  --command="$remote"
