#!/usr/bin/env bash
# Trains with jdm on the NVIDIA GPUs of this machine, in the background, with a log.
#
#   launch/gpu.sh [start]   start, unless it runs already, and follow
#   launch/gpu.sh follow    follow its output
#   launch/gpu.sh status    whether it runs, or how it ended
#   launch/gpu.sh stop      stop it; the same command resumes
#
# example: launch/gpu.sh --config=reference/cifar10 --workdir=runs/cifar10 -- --config.train.steps=1000
#
# --config=NAME      as of jdm train
# --workdir=FOLDER   as of jdm train; output and status go beside it, into FOLDER.launch
# --gpus=0,1         the numbers of the GPUs; default: all
# --processes=N      default 1: one process drives all GPUs, which is how JAX works by default.
#                    More share the GPUs among them evenly.
# --port=8476        at which the processes find each other, where there are several
# --restarts=3       how often a training is started again that ended with another status than 0 and 2
# --detach           do not follow
# --dry-run          print the commands only
# -- …               further flags of jdm train
#
# Ends with the status of the training. Control-C ends the following, not the training. To try it
# without a GPU, set JAX_PLATFORMS=cpu.
set -euo pipefail

here=$(dirname "$0")
# shellcheck source=launch/common.sh
source "$here/common.sh"

config='' workdir='' gpus='' processes=1 port=8476 restarts=3 detach=''
action=start
case ${1:-} in start | follow | status | stop) action=$1 && shift ;; esac
[[ ${1:-} == -* || $# == 0 ]] || fail "'$1' must be start, follow, status or stop"
read_options 'config workdir gpus processes port restarts' detach "$@"
required workdir
workdir=${workdir%/}
for name in processes port; do fits "$name" '[1-9][0-9]{0,4}' 'must be a whole number above 0'; done
fits restarts '[0-9]{1,4}' 'must be a whole number'
((port < 65536)) || fail "--port='$port' must be below 65536"
[[ -z $gpus ]] || fits gpus '[0-9]+(,[0-9]+)*' 'must be numbers of GPUs, such as 0,1'

worker() { run bash "$here/worker.sh" "$1" "$workdir.launch/$2" "${@:3}"; }

case $action in
follow)
  worker follow 0
  exit
  ;;
status | stop)
  if [[ -z $dry_run ]]; then
    shopt -s nullglob
    found=("$workdir.launch"/*)
    ((${#found[@]})) || fail "--workdir='$workdir' has no $workdir.launch: nothing was started"
    processes=${#found[@]}
  fi
  for ((i = 0; i < processes; i++)); do
    # At the same time: where one of them has ended, the others end too, and would be started again.
    if [[ $action == stop && -z $dry_run ]]; then worker stop "$i" & else worker "$action" "$i"; fi
  done
  wait
  exit
  ;;
esac

required config
check_jdm_flags
needs jdm "pip install jdm, or activate its environment"
found=()
if [[ ${JAX_PLATFORMS:-} != cpu ]]; then
  needs nvidia-smi "install NVIDIA's driver"
  if [[ $gpus ]]; then
    IFS=, read -ra found <<<"$gpus"
  elif command -v nvidia-smi >/dev/null; then
    mapfile -t found < <(nvidia-smi --query-gpu=index --format=csv,noheader)
  else
    fail "--gpus is missing: this machine has no nvidia-smi to count them"
  fi
  ((${#found[@]})) || fail "this machine has no GPU that nvidia-smi lists"
  ((${#found[@]} % processes == 0)) ||
    fail "--processes='$processes' does not divide the ${#found[@]} GPUs"
  # A training that runs already has them, with most of their memory.
  if [[ -z $dry_run && $(bash "$here/worker.sh" status "$workdir.launch/0") != running ]]; then
    seen=$(CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${found[*]}") jdm doctor 2>/dev/null |
      grep -cE '^device +(gpu|cuda) ') || true
    [[ $seen == "${#found[@]}" ]] ||
      fail "JAX sees $seen of the ${#found[@]} GPUs: pip install \"jax[cuda12]\", and jdm doctor"
  fi
fi

share=$((${#found[@]} / processes))
for ((i = 0; i < processes; i++)); do
  command=(jdm train "--config=$config" "--workdir=$workdir")
  if ((processes > 1)); then
    command+=("--coordinator=127.0.0.1:$port" "--processes=$processes" "--process=$i")
  fi
  command+=(${jdm[@]+"${jdm[@]}"})
  if ((share)); then
    mine=$(IFS=, && echo "${found[*]:i*share:share}")
    command=(env "CUDA_VISIBLE_DEVICES=$mine" "${command[@]}")
  fi
  worker start "$i" "$restarts" "${command[@]}"
done
[[ -z $detach ]] || exit 0
trap 'say "the training goes on; see it with: launch/gpu.sh follow --workdir=$workdir"; exit 130' INT
status=0
for ((i = 0; i < processes; i++)); do
  if ((i == 0)); then
    worker follow 0 || status=$?
  elif [[ -z $dry_run ]]; then
    bash "$here/worker.sh" follow "$workdir.launch/$i" >/dev/null 2>&1 || status=$((status ? status : $?))
  fi
done
exit "$status"
