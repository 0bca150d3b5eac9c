#!/usr/bin/env bash
# Runs jetflow on a TPU VM, or on all workers of a pod slice, by gcloud. See launch/README.md.
set -euo pipefail

usage() {
  cat <<'EOF'
launch/tpu_vm.sh ACTION NAME [options] [jetflow …]

  create NAME --topology v5e:4x4 [--spot]   make the TPU VM
  setup  NAME [--bucket BUCKET]             copy this checkout to all workers, install it, BUCKET at /bucket
  run    NAME jetflow train --config …      start on all workers; goes on when you log out
  keep   NAME --topology … jetflow train …  all of these, and again after a preemption, until it has ended
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
# On a worker: whether a run holds the lock, which goes with the run's processes, however they end.
# shellcheck disable=SC2016  # it is the workers that expand it
UNDER_WAY='under_way() { [[ -e ~/jetflow/run.lock ]] && ! flock --nonblock --shared ~/jetflow/run.lock true; }'

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
  act gcloud compute tpus tpu-vm "$verb" "$@" ${place[@]+"${place[@]}"}  # bash 3.2 calls an empty array unbound
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
  local root archive=${TMPDIR:-/tmp}/jetflow.$$.tgz
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  # All files as they are now, new ones too, but for what git ignores and what was deleted.
  act bash -o pipefail -c "cd $(printf %q "$root") &&
git -c core.quotePath=false ls-files --cached --others --exclude-standard |
grep -vxFf <(git -c core.quotePath=false ls-files --deleted) | tar -czf $(printf %q "$archive") -T -" &&
    tpu scp "$archive" "$name:jetflow.tgz" --worker=all &&
    on_workers all "$(remote_setup)" &&
    act rm "$archive"
}

busy=2  # the status of a worker whose run is under way, and goes on

remote_check() {
  cat <<EOF
set -euo pipefail
$UNDER_WAY
leave() { echo "\$(hostname): a run is under way, and goes on; stop it before another" >&2; exit $busy; }
if under_way; then leave; fi
rm -f ~/jetflow/run.status ~/jetflow/run.stopped
EOF
}

remote_setup() {
  remote_check
  cat <<'EOF'
mkdir -p ~/jetflow
cd ~/jetflow
tar xzf ~/jetflow.tgz
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[[ -d .venv ]] || uv venv --quiet --python 3.12 .venv
source .venv/bin/activate
uv pip install --quiet -e '.[tpu]'
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
  gcsfuse --implicit-dirs --rename-dir-limit=200000 $(printf %q "$bucket") /bucket
}
EOF
}

run() { needs_command && on_workers all "$(remote_run)"; }

remote_run() {
  remote_check
  cat <<EOF
cd ~/jetflow
source .venv/bin/activate
if [[ -z \${JETFLOW_PROCESSES:-} ]]; then
  workers=\$(curl -fsS --retry 5 -H Metadata-Flavor:Google $METADATA/worker-network-endpoints)
  JETFLOW_PROCESSES=\$(tr , '\\n' <<<"\$workers" | grep -c .) || {
    echo "\$(hostname): the metadata name no workers" >&2; exit 1
  }
fi
export JETFLOW_PROCESSES
[[ -x launch/restart.sh ]] && command -v jetflow >/dev/null || {
  echo "\$(hostname): jetflow is not there; setup first" >&2; exit 1
}
exec 9>run.lock
flock --timeout 10 9 || leave  # the run inherits it; who only looks has it for a moment
STATUS_FILE=run.status nohup setsid launch/restart.sh $(printf '%q ' "${command[@]}") >>run.log 2>&1 </dev/null &
echo \$! >run.pid
EOF
}

logs() { on_workers "$worker" 'tail -n 200 -F ~/jetflow/run.log'; }

stop() { on_workers all "$(remote_stop)"; }

remote_stop() {
  cat <<EOF
$UNDER_WAY
if under_way; then touch ~/jetflow/run.stopped; kill -TERM "\$(cat ~/jetflow/run.pid)"; fi
while under_way; do sleep 1; done
echo "\$(hostname): ended with status \$(cat ~/jetflow/run.status)"
EOF
}

delete() { tpu delete "$name" --quiet; }

# Until the run has ended on all workers: make anew what was preempted, and run wherever nothing runs.
keep() {
  needs_topology
  needs_command
  busy=0
  if [[ -n $dry_run ]]; then
    tpu describe "$name" --format='value(state)'
    create && setup && run
    return
  fi
  local state
  while true; do
    state=$(tpu describe "$name" --format='value(state)' 2>/dev/null) || state=
    case $state in
      READY) attend ;;
      '') try create ;;
      PREEMPTED | TERMINATED)
        echo "$(date -u +%FT%TZ): $name is $state; making it anew" >&2
        try delete ;;
      *ING) sleep "$POLL" ;;  # as in REPAIRING: on its way to another state
      *)
        echo "tpu_vm.sh: $name is $state, and left as it is; start or delete it, and keep it again" >&2
        exit 1 ;;
    esac
  done
}

try() {
  "$@" && return
  echo "$(date -u +%FT%TZ): $1 failed for $name; again in $POLL s" >&2
  sleep "$POLL"
}

begin() { setup && run && begun=1; }

# A look at the workers of a TPU VM that is ready; what they need. What had ended before is run again.
begun='' short=''
attend() {
  local found statuses status
  found=$(on_workers all "$(remote_look)" | grep -o 'jetflow: [a-z].*') || { sleep "$POLL"; return; }
  if [[ $found == *idle* || -z $begun && $found != *running* ]]; then
    try begin
    return
  fi
  begun=1
  statuses=$(sed -n 's/.* ended //p' <<<"$found" | sort -nu)
  status=$(grep -vxE '0|130|143' <<<"$statuses" | head -n 1) || status=$(tail -n 1 <<<"$statuses")
  if [[ $found != *running* ]]; then
    echo "ended with status ${statuses//$'\n'/ }"
    exit "$status"
  fi
  # The others cannot go on without a worker that gave up, and time passes before they do as well.
  if [[ $status =~ ^(|0|130|143)$ ]]; then short=; elif [[ -z $short ]]; then short=1; else stop || true; fi
  sleep "$POLL"
}

# What was told to stop, and not by us, was so by a machine that went down, and is not at its end.
remote_look() {
  cat <<EOF
$UNDER_WAY
under_way && { echo "jetflow: running"; exit; }
status=\$(cat ~/jetflow/run.status 2>/dev/null)  # after that look: a run writes it as it ends
if [[ -z \$status || \$status == 143 && ! -e ~/jetflow/run.stopped ]]; then echo "jetflow: idle"
else echo "jetflow: ended \$status"
fi
EOF
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
