#!/usr/bin/env bash
# Runs jetflow on a TPU VM, or on all workers of a pod slice, by gcloud. See launch/README.md.
set -euo pipefail

usage() {
  cat <<'EOF'
launch/tpu_vm.sh ACTION NAME [options] [jetflow …]

  create NAME --topology v5e:4x4 [--spot]   make the TPU VM
  setup  NAME [--bucket BUCKET]             copy this checkout to all workers, install it, BUCKET at /bucket
  run    NAME jetflow train --config …      start on all workers; goes on when you log out
  keep   NAME --topology … jetflow train …  create, setup, run; and all again after a preemption
  logs   NAME [--worker 0]                  follow the log
  stop   NAME                               save, and stop
  delete NAME                               delete the TPU VM

options: --zone ZONE, --project PROJECT (default: gcloud's own), --dry-run (print, do nothing)
EOF
}

fail() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

POLL=${POLL:-60}  # seconds between two looks at a TPU VM that is kept
METADATA=http://metadata.google.internal/computeMetadata/v1/instance/attributes

topology='' bucket='' spot='' worker=0 dry_run='' command=()
place=()
read_options() {
  while (($#)); do
    case $1 in
      --zone | --project) place+=("$1=${2:?value}"); shift 2 ;;
      --zone=* | --project=*) place+=("$1"); shift ;;
      --topology | --bucket | --worker)
        (($# > 1)) || fail "$1 needs a value"
        printf -v "${1#--}" %s "$2"; shift 2 ;;
      --topology=* | --bucket=* | --worker=*)
        local name=${1%%=*}
        printf -v "${name#--}" %s "${1#*=}"; shift ;;
      --spot) spot=--spot; shift ;;
      --dry-run) dry_run=1; shift ;;
      jetflow) command=("$@"); return ;;
      *) fail "unknown option $1; what jetflow is to do begins with the word jetflow" ;;
    esac
  done
}

# Runs a command, or prints it where nothing is to be done.
act() {
  if [[ -z $dry_run ]]; then
    "$@"
    return
  fi
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  echo "${line% }"
}

tpu() {
  local verb=$1
  shift
  act gcloud compute tpus tpu-vm "$verb" "$@" "${place[@]}"
}

on_workers() {  # WORKER COMMAND
  tpu ssh "$name" --worker="$1" --command="$2"
}

needs_topology() { [[ -n $topology ]] || fail "$action needs --topology, as in --topology v5e:4x4"; }
needs_command() { ((${#command[@]})) || fail "$action needs a command, as in jetflow train --config …"; }

create() {
  needs_topology
  local generation=${topology%%:*} shape=${topology#*:} type
  [[ $topology =~ ^[a-z0-9]+:[0-9]+(x[0-9]+)+$ ]] || fail "--topology is $topology; expected GENERATION:SHAPE"
  local chips=$((${shape//x/*}))
  case $generation in
    v4) type=(--type=v4 --topology="$shape" --version=tpu-ubuntu2204-base) ;;
    v5e) type=(--accelerator-type="v5litepod-$chips" --version=v2-alpha-tpuv5-lite) ;;
    v5p) type=(--accelerator-type="v5p-$((2 * chips))" --version=v2-alpha-tpuv5) ;;
    v6e) type=(--accelerator-type="v6e-$chips" --version=v2-alpha-tpuv6e) ;;
    tpu7x) fail "tpu7x is to be had by GKE alone: launch/gke.py" ;;
    *) fail "--topology is $topology; expected a generation of v4, v5e, v5p or v6e" ;;
  esac
  tpu create "$name" "${type[@]}" ${spot:+"$spot"}
}

setup() {
  local root archive=${TMPDIR:-/tmp}/jetflow.$$.tgz tree
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  # A commit, of nobody, of what is changed and not committed; none where nothing is.
  tree=$(git -C "$root" -c user.name=jetflow -c user.email=jetflow@localhost stash create)
  act git -C "$root" archive --output="$archive" "${tree:-HEAD}" &&
    tpu scp "$archive" "$name:jetflow.tgz" --worker=all &&
    on_workers all "$(remote_setup)" &&
    act rm "$archive"
}

remote_setup() {
  cat <<'EOF'
set -euo pipefail
mkdir -p ~/jetflow && tar xzf ~/jetflow.tgz -C ~/jetflow && cd ~/jetflow
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[[ -d .venv ]] || uv venv --quiet --python 3.12 .venv
source .venv/bin/activate && uv pip install --quiet -e '.[tpu]'
EOF
  [[ -z $bucket ]] || cat <<EOF
command -v gcsfuse >/dev/null || {
  release=gcsfuse-\$(lsb_release -cs) keys=/usr/share/keyrings/gcsfuse.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee \$keys >/dev/null
  echo "deb [signed-by=\$keys] https://packages.cloud.google.com/apt \$release main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
}
mountpoint -q /bucket || {
  sudo mkdir -p /bucket && sudo chown "\$(id -un)" /bucket
  gcsfuse --implicit-dirs $(printf %q "$bucket") /bucket
}
EOF
}

run() {
  needs_command
  on_workers all "$(remote_run)"
}

remote_run() {
  cat <<EOF
cd ~/jetflow && source .venv/bin/activate
if [[ -f run.pid ]] && kill -0 "\$(cat run.pid)" 2>/dev/null; then
  echo "\$(hostname): a run is under way; stop it first" >&2; exit 2
fi
[[ -n \${JETFLOW_PROCESSES:-} ]] || JETFLOW_PROCESSES=\$(curl -fsS -H Metadata-Flavor:Google $METADATA/worker-network-endpoints | tr , '\\n' | grep -c .)
export JETFLOW_PROCESSES
rm -f run.status
STATUS_FILE=run.status nohup setsid launch/restart.sh $(printf '%q ' "${command[@]}") >>run.log 2>&1 </dev/null &
echo \$! >run.pid
EOF
}

logs() { on_workers "$worker" 'tail -n 200 -F ~/jetflow/run.log'; }

stop() {
  # shellcheck disable=SC2016  # it is the workers that expand it
  on_workers all 'cd ~/jetflow && pid=$(cat run.pid) && kill -TERM "$pid" 2>/dev/null
while kill -0 "$pid" 2>/dev/null; do sleep 1; done
echo "$(hostname): ended with status $(cat run.status)"'
}

delete() { tpu delete "$name" --quiet; }

# Until the run has ended, make anew what was preempted, and run there; the workdir goes on.
keep() {
  needs_topology
  needs_command
  local state status
  while true; do
    state=$(tpu describe "$name" --format='value(state)' 2>/dev/null) || state=
    if [[ -n $dry_run ]]; then
      echo "$state"
    elif [[ $state == READY ]]; then
      status=$(on_workers 0 'cat ~/jetflow/run.status 2>/dev/null || true') || status=
      [[ $status =~ ^[0-9]+$ ]] && echo "ended with status $status" && exit "$status"
      sleep "$POLL"
      continue
    elif [[ $state == CREATING || $state == STARTING || $state == REPAIRING || $state == DELETING ]]; then
      sleep "$POLL"
      continue
    elif [[ -n $state ]]; then
      echo "$(date -u +%FT%TZ): $name is $state; making it anew" >&2
      delete || true
    fi
    if ! { create && setup && run; }; then
      echo "$(date -u +%FT%TZ): $name could not be made; again in $POLL s" >&2
      sleep "$POLL"
    fi
    [[ -z $dry_run ]] || return 0
  done
}

(($#)) || { usage; exit 2; }
action=$1
case $action in
  -h | --help | help) usage; exit ;;
  create | setup | run | keep | logs | stop | delete) ;;
  *) fail "$action is no action; expected create, setup, run, keep, logs, stop or delete" ;;
esac
name=${2:-}
[[ -n $name && $name != -* && $name != jetflow ]] || fail "$action needs the name of a TPU VM"
read_options "${@:3}"
"$action"
