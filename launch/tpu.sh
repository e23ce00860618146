#!/usr/bin/env bash
# Trains with jdm on Cloud TPU: one VM, or a slice of many, through a queued resource.
#
#   launch/tpu.sh [run]    create the queued resource or take up the one of this name, wait, install,
#                          start on every worker, follow; start again after a failure or a
#                          preemption; delete when the training is complete. The same command goes on.
#   launch/tpu.sh state    of the queued resource, and of the training on every worker
#   launch/tpu.sh logs     follow the output of a worker
#   launch/tpu.sh stop     stop the training; the machines stay
#   launch/tpu.sh delete   delete the queued resource and its machines
#
# example: launch/tpu.sh --project=P --zone=us-west4-a --slice=v5litepod-16 --spot --store=gs://B \
#            --package=jdm==0.2.0 --config=reference/cifar10 --workdir=cifar10
#
# --project=ID --zone=ZONE   of Google Cloud; all commands need both
# --name=jdm          of the queued resource and of the TPU
# --slice=TYPE        v5litepod-16, v6e-8, …: the accelerator type
# --runtime=VERSION   the image of the machines; default: by the type
# --spot              cheaper; may be taken away at any time
# --store=WHERE       gs://BUCKET (with hierarchical namespace), or HOST:/EXPORT of Filestore or another
#                     NFS server; every worker mounts it at /mnt/jdm
# --workdir=FOLDER    in the store
# --package=WHAT      jdm==VERSION, a wheel (a file here), or git+https://…/jdm@VERSION
# --config=NAME       as of jdm train, or a .py file here
# --restarts=10       how often a training is started again that ended with another status than 0 and 2;
#                     preemptions do not count
# --delete=done       done: when the training is complete; ended: however it ends; never
# --worker=0          whose output logs shows
# --dry-run           print the commands only
# -- …                further flags of jdm train
#
# As long as the queued resource stands, it costs money, whether it computes or not.
set -euo pipefail

here=$(dirname "$0")
# shellcheck source=launch/common.sh
source "$here/common.sh"

project='' zone='' name=jdm slice='' runtime='' spot='' store='' workdir='' package='' config=''
restarts=10 delete='done' worker=0
action=run
case ${1:-} in run | state | logs | stop | delete) action=$1 && shift ;; esac
[[ ${1:-} == -* || $# == 0 ]] || fail "'$1' must be run, state, logs, stop or delete"
read_options 'project zone name slice runtime store workdir package config restarts delete worker' \
  spot "$@"

required project zone
fits project '[a-z0-9:.-]+' 'must be the ID of a project'
fits zone '[a-z]+-[a-z]+[0-9]+-[a-z]' 'must be a zone, such as us-west4-a'
fits name '[a-z]([a-z0-9-]{0,60}[a-z0-9])?' 'must be lower-case letters, digits and -'
fits restarts '[0-9]{1,4}' 'must be a whole number'
fits delete 'done|ended|never' 'must be done, ended or never'
fits worker '[0-9]{1,4}' 'must be the number of a worker'

where=("--project=$project" "--zone=$zone")
again=$(quoted "$0" delete "${where[@]}" "--name=$name")
pause=${LAUNCH_PAUSE:-30} # seconds
run_folder='jdm-run'      # of worker.sh, in the home folder of every worker
failures=0
before=none # the state that was last said
seen='' # whether a training was started or followed on the machines that stand

if [[ $action == run ]]; then
  required slice store workdir package config
  fits slice '(v[234]|v5litepod|v5p|v6e)-[1-9][0-9]*' \
    'must be an accelerator type: v2, v3, v4, v5litepod, v5p or v6e, and a size, such as v5litepod-16'
  if [[ -z $runtime ]]; then
    case $slice in # https://cloud.google.com/tpu/docs/runtimes
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    *) runtime=tpu-ubuntu2204-base ;;
    esac
  fi
  fits store 'gs://[a-z0-9][a-z0-9._-]+|[A-Za-z0-9.-]+:/[^ ]*' \
    'must be gs://BUCKET, or HOST:/EXPORT of an NFS server'
  fits workdir '[A-Za-z0-9][A-Za-z0-9_./-]*' 'must be a path in the store, such as runs/cifar10'
  [[ /$workdir/ != */../* ]] || fail "--workdir='$workdir' must be a path in the store, without .."
  files=("$here/worker.sh")
  case $package in
  *.whl)
    [[ -f $package ]] || fail "--package='$package' is no file here"
    files+=("$package")
    package=./${package##*/}
    ;;
  git+https://*@* | jdm==*) ;;
  *) fail "--package='$package' must be jdm==VERSION, a wheel, or git+https://…/jdm@VERSION" ;;
  esac
  if [[ $config == *.py ]]; then
    [[ -f $config ]] || fail "--config='$config' is no file here"
    files+=("$config")
    config=${config##*/}
  fi
  check_jdm_flags
  # Compiled programs are kept in the store, so that a restart does not compile.
  training=(env JAX_COORDINATOR_PORT=8476 TFDS_DATA_DIR=/mnt/jdm/tfds
    JAX_COMPILATION_CACHE_DIR=/mnt/jdm/xla
    jdm train "--config=$config" "--workdir=/mnt/jdm/$workdir" --distributed
    ${jdm[@]+"${jdm[@]}"})
fi
needs gcloud "https://cloud.google.com/sdk/docs/install"

queued() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }

# on WORKER words…: runs worker.sh there.
on() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" --quiet \
    "--command=$(quoted bash worker.sh "${@:2}")"
}

# The state of the queued resource; nothing where there is none.
state() {
  local said
  if said=$(queued describe '--format=value(state.state)' 2>"$errors"); then
    echo "$said"
  elif ! grep -q NOT_FOUND "$errors"; then
    cat "$errors" >&2
    return 1
  fi
}

# Something of Google Cloud has failed: waits, and ends this script after ten times in a row.
failed() {
  failures=$((failures + 1))
  say "$1 (failure $failures of 10)"
  if ((failures >= 10)); then
    say "$name may still stand, and cost money; to delete it: $again"
    exit 1
  fi
  sleep "$pause"
}

remove() { queued delete --force --quiet; }

create() {
  seen=''
  queued create "--node-id=$name" "--accelerator-type=$slice" "--runtime-version=$runtime" \
    ${spot:+--spot} --scopes=https://www.googleapis.com/auth/cloud-platform
}

# Returns when the machines are there.
ready() {
  local now
  if [[ $dry_run ]]; then
    queued describe '--format=value(state.state)'
    note "where there is none, or after deleting one that is SUSPENDED or FAILED"
    create
    note "describe, every $pause seconds, until it is ACTIVE"
    return
  fi
  while true; do
    now=$(state) || { failed "the state of $name cannot be read" && continue; }
    [[ $now == "$before" ]] || say "$name: ${now:-not there}"
    before=$now
    case $now in
    ACTIVE) return ;;
    '') if create; then sleep "$pause"; else failed "$name could not be created"; fi ;;
    SUSPENDED) remove || failed "$name could not be deleted" ;;
    FAILED)
      queued describe '--format=value(state)' >&2 || true
      remove || true
      failed "the request $name has failed"
      ;;
    *) sleep "$pause" ;;
    esac
  done
}

start() {
  run gcloud compute tpus tpu-vm scp "${files[@]}" "$name:" "${where[@]}" --worker=all --quiet &&
    on all mount "$store" "/mnt/jdm/$workdir" &&
    on all install "$package" &&
    on all start "$run_folder" 0 "${training[@]}"
}

# finish STATUS SENTENCE
finish() {
  say "$2"
  if [[ $delete == ended || ($delete == 'done' && $1 == 0) ]]; then
    remove || say "$name could not be deleted; it costs money: $again"
  else
    say "$name stands, and costs money; to delete it: $again"
  fi
  exit "$1"
}

case $action in
state)
  queued describe '--format=value(state.state)'
  on all status "$run_folder"
  exit
  ;;
logs)
  on "$worker" follow "$run_folder"
  exit
  ;;
stop)
  on all stop "$run_folder"
  exit
  ;;
delete)
  remove
  exit
  ;;
esac

if [[ $store == gs://* ]]; then
  found=$(run gcloud storage buckets describe "$store" "--project=$project" --raw \
    '--format=value(hierarchicalNamespace.enabled)') || fail "--store='$store' cannot be read"
  [[ -z $dry_run ]] || echo "$found"
  [[ $dry_run || $found == True ]] || fail "--store='$store' must be a bucket with hierarchical namespace,\
 where a folder is renamed in one step: gcloud storage buckets create --enable-hierarchical-namespace"
fi
if [[ $dry_run ]]; then
  ready
  start
  on 0 follow "$run_folder"
  on all status "$run_folder"
  note "where a worker has ended with another status than 0 and 2: from describe on, once more"
  [[ $delete == never ]] || { note "when the training is complete" && remove; }
  exit
fi
trap 'say "the training goes on, and $name costs money; the same command follows it; to delete it: $again"
  exit 130' INT
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
while true; do
  ready
  said=$(on all status "$run_folder" 2>/dev/null) || said=''
  if [[ $seen ]]; then
    case $said in
    '')
      failed "the workers cannot be reached"
      continue
      ;;
    *running*) sleep "$pause" ;; # the connection was lost, or the others have not noticed yet
    *absent*) seen='' ;;
    *'ended 2'*) finish 2 "a worker has refused its input, with status 2; its output says why" ;;
    *'ended '[!0]*)
      ((restarts-- > 0)) || finish 1 "the training has failed, and is not started again"
      say "the training has ended early; it is started again, $restarts more times at most"
      seen=''
      ;;
    *) finish 0 "the training is complete" ;;
    esac
  fi
  if [[ -z $seen && ($said != *running* || $said == *absent*) ]]; then
    start || { failed "the training could not be started on every worker" && continue; }
  fi
  seen=yes failures=0
  on 0 follow "$run_folder" || true # ends with the training, or with the connection
done
