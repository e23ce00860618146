#!/usr/bin/env bash
# What the other scripts of this folder run on a machine that trains.
#
#   worker.sh mount gs://BUCKET|HOST:/EXPORT FOLDER   mounts it at /mnt/jdm; makes FOLDER there
#   worker.sh install PACKAGE                         jdm and JAX for TPUs, into ~/jdm-venv
#   worker.sh start STATE RESTARTS COMMAND…           in the background, unless it runs already
#   worker.sh follow STATE                            its output, until it ends; with its status
#   worker.sh status STATE                            "running", "ended STATUS" or "absent"
#   worker.sh stop STATE                              SIGTERM, and SIGKILL after two minutes
#
# STATE is a folder: log, status, and lock, which is held as long as the command runs. A command that
# ends with a status other than 0 and 2 is started again, RESTARTS times at most.
set -euo pipefail

# Last: on a machine of one's own, the environment that is active comes first.
PATH=$PATH:$HOME/jdm-venv/bin:$HOME/.local/bin
MOUNT=/mnt/jdm

install_packages() { # Debian's
  sudo apt-get -o DPkg::Lock::Timeout=600 update -q
  sudo apt-get -o DPkg::Lock::Timeout=600 install -q -y "$@"
}

mount_store() {
  local store=$1 folder=$2 keys=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
  sudo mkdir -p "$MOUNT"
  if ! mountpoint -q "$MOUNT"; then
    if [[ $store == gs://* ]]; then
      if ! command -v gcsfuse >/dev/null; then
        curl -fsSL "$apt/doc/apt-key.gpg" | sudo tee "$keys" >/dev/null
        echo "deb [signed-by=$keys] $apt gcsfuse-$(lsb_release -cs) main" |
          sudo tee /etc/apt/sources.list.d/gcsfuse.list
        install_packages gcsfuse
      fi
      sudo chown "$(id -u):$(id -g)" "$MOUNT"
      # No caches: a worker must see at once what another has written. With streaming writes, a file
      # could be seen only when it is closed, and train.lock stays open as long as a run.
      gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        --kernel-list-cache-ttl-secs=0 --enable-streaming-writes=false "${store#gs://}" "$MOUNT"
    else
      command -v mount.nfs >/dev/null || install_packages nfs-common
      # The kernel would remember for up to a minute that a file was not there.
      sudo mount -t nfs -o hard,lookupcache=positive "$store" "$MOUNT"
      sudo chown "$(id -u):$(id -g)" "$MOUNT"
    fi
  fi
  mkdir -p "$folder"
}

install_jdm() {
  # The images of TPU VMs have Python 3.10, which is too old; uv brings another one.
  command -v uv >/dev/null || python3 -m pip install --user --quiet uv
  [[ -x $HOME/jdm-venv/bin/python ]] || uv venv --quiet --python 3.12 "$HOME/jdm-venv"
  uv pip install --quiet --python "$HOME/jdm-venv/bin/python" --reinstall-package jdm "$1" 'jax[tpu]'
  jdm --version
}

is_running() { [[ -e $1/lock ]] && ! flock --shared --nonblock "$1/lock" true; }

status() {
  if is_running "$1"; then
    echo running
  elif [[ -f $1/status ]]; then
    echo "ended $(<"$1/status")"
  elif [[ -f $1/log ]]; then
    echo "ended 137" # killed, with all that would have written its status
  else
    echo absent
  fi
}

start() {
  local state=$1 restarts=$2
  shift 2
  mkdir -p "$state"
  exec 9>>"$state/lock" # the command inherits it
  if ! flock --wait 1 9; then
    echo "it runs already: $state"
    return
  fi
  rm -f "$state/status" "$state/pid"
  echo "$(date -Is) on $(hostname): $*" >>"$state/log"
  setsid bash "$0" repeat "$state" "$restarts" "$@" </dev/null >>"$state/log" 2>&1 &
  until [[ -s $state/pid ]] || ! kill -0 $! 2>/dev/null; do sleep 0.05; done
  echo "started: $state"
}

repeat() {
  local state=$1 left=$2 stopped='' status
  shift 2
  echo $$ >"$state/pid" # that of its session, too
  trap 'stopped=yes' TERM
  while true; do
    status=0
    "$@" || status=$?
    ((status == 0 || status == 2 || left == 0)) || [[ $stopped ]] || sleep "${LAUNCH_PAUSE:-5}" || true
    [[ $stopped ]] || ((status == 0 || status == 2 || left == 0)) && break
    left=$((left - 1))
    echo "$(date -Is) it ended with status $status and is started again; $left more times at most"
  done
  echo "$(date -Is) it ended with status $status"
  echo "$status" >"$state/status.new"
  mv "$state/status.new" "$state/status"
}

follow() {
  local said
  [[ -f $1/log ]] || { echo "nothing was started: $1" >&2; return 1; }
  if is_running "$1"; then
    tail -n 100 -F "$1/log" --pid="$(<"$1/pid")" -s "${LAUNCH_PAUSE:-1}"
  else
    tail -n 100 "$1/log"
  fi
  while is_running "$1"; do sleep 0.2; done
  said=$(status "$1")
  return "${said#ended }"
}

stop() {
  if is_running "$1"; then
    kill -TERM -- "-$(<"$1/pid")" 2>/dev/null || true
    flock --wait 120 "$1/lock" true || kill -KILL -- "-$(<"$1/pid")"
  fi
  status "$1"
}

main() {
  case ${1:-} in
  mount) mount_store "$2" "$3" ;;
  install) install_jdm "$2" ;;
  start) start "${@:2}" ;;
  repeat) repeat "${@:2}" ;;
  follow) follow "$2" ;;
  status) status "$2" ;;
  stop) stop "$2" ;;
  *)
    sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//;p;}' "$0" >&2
    exit 2
    ;;
  esac
}

# On one line: the file may be replaced while it runs.
main "$@"; exit
