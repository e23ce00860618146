#!/usr/bin/env bash
# Trains with jdm on a GKE cluster of TPUs, through xpk.
#
#   launch/xpk.sh [run]    create the workload, unless there is one of this name, and wait for its end
#   launch/xpk.sh logs     follow the output of its process 0, with kubectl
#   launch/xpk.sh delete   delete the workload; the cluster stays
#
# example: launch/xpk.sh --project=P --zone=us-west4-a --cluster=C --slice=v5litepod-16 \
#            --image=us-docker.pkg.dev/P/jdm/jdm:0.2.0 --config=reference/cifar10 --workdir=/mnt/jdm/cifar10
#
# --project=ID --zone=ZONE --cluster=NAME   all commands need them
# --name=jdm          of the workload
# --slice=TYPE        v5litepod-16, v6e-8, …: xpk's --tpu-type
# --image=ADDRESS     of a container with jdm and jax[tpu] (docs/launch.md has a Dockerfile)
# --workdir=FOLDER    where the cluster mounts a storage, attached with xpk storage attach
# --config=NAME       as of jdm train; a file must be in the image
# --restarts=100      how often the workload is started again that ended with another status than 0 and 2
# --dry-run           print the commands only
# -- …                further flags of jdm train
#
# As long as the cluster stands, it costs money, with workloads or without.
set -euo pipefail

here=$(dirname "$0")
# shellcheck source=launch/common.sh
source "$here/common.sh"

project='' zone='' cluster='' name=jdm slice='' image='' workdir='' config='' restarts=100
action=run
case ${1:-} in run | logs | delete) action=$1 && shift ;; esac
[[ ${1:-} == -* || $# == 0 ]] || fail "'$1' must be run, logs or delete"
read_options 'project zone cluster name slice image workdir config restarts' '' "$@"

required project zone cluster
fits project '[a-z0-9:.-]+' 'must be the ID of a project'
fits zone '[a-z]+-[a-z]+[0-9]+-[a-z]' 'must be a zone, such as us-west4-a'
fits name '[a-z]([a-z0-9-]{0,30}[a-z0-9])?' 'must be at most 32 lower-case letters, digits and -'
fits restarts '[0-9]{1,4}' 'must be a whole number'
where=("--cluster=$cluster" "--project=$project" "--zone=$zone")

if [[ $action == run ]]; then
  required slice image workdir config
  fits slice '[a-z0-9]+-[1-9][0-9x]*' "must be one of xpk's TPU types, such as v5litepod-16"
  fits workdir '/.+' 'must be an absolute path, below the mount point of a storage'
  check_jdm_flags
fi

if [[ $action == logs ]]; then
  needs kubectl "gcloud components install kubectl"
  # The labels of JobSet and Job.
  run kubectl logs --follow --container=jax-tpu \
    --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
  exit
fi
needs xpk "pip install xpk"
if [[ $action == delete ]]; then
  run xpk workload delete "--workload=$name" "${where[@]}" --force
  exit
fi

found=''
if [[ $dry_run ]]; then
  run xpk workload list "--filter-by-job=$name" "${where[@]}"
  note "where there is none"
else
  found=$(xpk workload list "--filter-by-job=$name" "${where[@]}") ||
    fail "--cluster='$cluster' cannot be read: ${found//$'\n'/ }"
fi
if grep -qE "^$name " <<<"$found"; then
  say "the workload $name is there already"
else
  # xpk starts a workload again after the statuses 42 and 127 to 255, and those that are named. It
  # sends SIGTERM to the shell that runs the command: exec makes that jdm itself.
  run xpk workload create "--workload=$name" "${where[@]}" "--tpu-type=$slice" "--docker-image=$image" \
    "--max-restarts=$restarts" --restart-on-exit-codes=1 --termination-grace-period-seconds=300 \
    "--command=exec $(quoted env "TFDS_DATA_DIR=${workdir%/*}/tfds" "JAX_COMPILATION_CACHE_DIR=${workdir%/*}/xla" \
      jdm train "--config=$config" "--workdir=$workdir" --distributed ${jdm[@]+"${jdm[@]}"})"
fi
run xpk workload list "--wait-for-job-completion=$name" "${where[@]}"
