#!/usr/bin/env bash
# Runs jetflow on a TPU VM, or on all workers of a pod slice, by gcloud. See launch/README.md.
#
#   create NAME v5e:4x4 [--spot …]            make the TPU VM; what follows the topology is for gcloud
#   run    NAME jetflow train --config …      copy this checkout to all workers, and start; goes on when you log out
#   logs   NAME [WORKER]                      follow the log
#   stop   NAME                               save, and stop
#   keep   NAME v5e:4x4 [--spot …] jetflow …  create and run, and again what was lost or preempted, until it has ended
#
# Options: --zone=ZONE, --project=PROJECT (default: gcloud's own), --dry-run (print, do nothing).
set -euo pipefail

POLL=${POLL:-60}  # seconds between two looks at a TPU VM that is kept

fail() { echo "tpu_vm.sh: $*" >&2; exit 2; }

tpu() {  # gcloud's words; printed where nothing is to be done
  local word words=(gcloud compute tpus tpu-vm "$@" ${place[@]+"${place[@]}"})  # bash 3.2 calls an empty array unbound
  if [[ -z $dry_run ]]; then "${words[@]}"; return; fi
  for word in "${words[@]}"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    printf '%s ' "$word"
  done
  echo
}

read_topology() {
  local topology=${options[0]:-}
  [[ $topology =~ ^[a-z0-9]+:[0-9]+(x[0-9]+)+$ ]] || fail "$action needs a topology, as in $action $name v5e:4x4"
  local shape=${topology#*:}
  local chips=$((${shape//x/*}))
  case ${topology%%:*} in
    v4) type=(--type=v4 --topology="$shape" --version=tpu-ubuntu2204-base) ;;
    v5e) type=(--accelerator-type="v5litepod-$chips" --version=v2-alpha-tpuv5-lite) ;;
    v5p) type=(--accelerator-type="v5p-$((2 * chips))" --version=v2-alpha-tpuv5) ;;
    v6e) type=(--accelerator-type="v6e-$chips" --version=v2-alpha-tpuv6e) ;;
    *) fail "the topology is $topology; expected one of v4, v5e, v5p or v6e (GKE has tpu7x)" ;;
  esac
}

create() { tpu create "$name" "${type[@]}" "${options[@]:1}"; }

# All files as they are now, new ones too, but for what git ignores and what was deleted.
pack() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  git -c core.quotePath=false ls-files --cached --others --exclude-standard |
    while IFS= read -r file; do [[ ! -e $file ]] || printf '%s\n' "$file"; done | tar -czf "$1" -T -
}

run() {
  local packed=jetflow-$$.tgz
  [[ -n $dry_run ]] || (pack "/tmp/$packed") &&
    tpu scp "/tmp/$packed" "$name:$packed" --worker=all &&
    tpu ssh "$name" --worker=all --command="$(remote_run "$packed")" &&
    rm -f "/tmp/$packed"
}

# The lock is taken before anything is touched, and the run inherits it: none is started twice.
remote_run() {
  cat <<EOF
set -euo pipefail
trap 'rm -f ~/$1' EXIT
mkdir -p ~/jetflow && cd ~/jetflow
exec 9>run.lock
flock --timeout 5 9 || {  # who only looks has it for a moment
  echo "\$(hostname): a run is under way, and goes on; stop it before another" >&2; exit $busy
}
echo \$\$ >run.pid
rm -f run.status run.stopped
tar xzf ~/$1
export PATH="\$HOME/.local/bin:\$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[[ -d .venv ]] || uv venv --quiet --python 3.12 .venv
source .venv/bin/activate
uv pip install --quiet -e '.[tpu,gcs]'
STATUS_FILE=run.status nohup setsid launch/restart.sh $(printf '%q ' "${command[@]}") >>run.log 2>&1 </dev/null &
echo \$! >run.pid
EOF
}

logs() { tpu ssh "$name" --worker="${options[0]:-0}" --command='tail -n 200 -F ~/jetflow/run.log'; }

# On a worker: whether a run holds the lock, which goes with the run's processes, however they end.
# shellcheck disable=SC2016  # it is the workers that expand it
UNDER_WAY='mkdir -p ~/jetflow && cd ~/jetflow
under_way() { [[ -e run.lock ]] && ! flock --nonblock --shared run.lock true; }'

stop() {
  tpu ssh "$name" --worker=all --command="$UNDER_WAY
told=
while under_way; do
  touch run.stopped
  pid=\$(cat run.pid)
  [[ \$pid == \"\$told\" ]] || kill -TERM \"\$pid\"
  told=\$pid
  sleep 1
done
echo \"\$(hostname): ended with status \$(cat run.status)\""
}

# What was told to stop, and not by `stop`, was so by a machine that went down, and is not at its end.
LOOK="$UNDER_WAY
if under_way; then echo 'jetflow: running'; exit; fi
status=\$(cat run.status 2>/dev/null)  # after that look: a run writes it as it ends
if [[ -e run.stopped ]]; then echo \"jetflow: ended \${status:-143}\"
elif [[ -z \$status || \$status == 143 ]]; then echo 'jetflow: idle'
else echo \"jetflow: ended \$status\"
fi"

# Until the run has ended on all workers: make anew what was preempted, and run wherever nothing runs.
keep() {
  local state
  if [[ -n $dry_run ]]; then tpu describe "$name" --format='value(state)' && create && run; return; fi
  busy=0
  while true; do
    state=$(tpu describe "$name" --format='value(state)' 2>/dev/null) || state=
    case $state in
      READY) attend; sleep "$POLL" ;;
      '') try create ;;
      PREEMPTED | TERMINATED) try tpu delete "$name" --quiet ;;
      *ING) sleep "$POLL" ;;  # as in REPAIRING: on its way to another state
      *) echo "tpu_vm.sh: $name is $state, and left as it is; start or delete it, and keep it again" >&2; exit 1 ;;
    esac
  done
}

try() { "$@" || { echo "$(date -u +%FT%TZ): $1 failed for $name; again in $POLL s" >&2; sleep "$POLL"; }; }
begin() { run && begun=1; }

# A look at the workers of a TPU VM that is ready. What had ended before this `keep` is run again.
begun='' short=''
attend() {
  local found statuses status
  found=$(tpu ssh "$name" --worker=all --command="$LOOK" | grep -o 'jetflow: [a-z].*') || return 0
  if [[ $found == *idle* || -z $begun && $found != *running* ]]; then try begin; return; fi
  begun=1
  statuses=$(sed -n 's/.* ended //p' <<<"$found" | sort -nu)
  status=$(grep -vxE '0|130|143' <<<"$statuses" | head -n 1) || status=$(tail -n 1 <<<"$statuses")
  if [[ $found != *running* ]]; then echo "ended with status ${statuses//$'\n'/ }"; exit "$status"; fi
  # The others cannot go on without a worker that gave up, and time passes before they do as well.
  if [[ $status =~ ^(|0|130|143)$ ]]; then short=; elif [[ -z $short ]]; then short=1; else stop || true; fi
}

action=${1:-} name=${2:-} dry_run='' busy=2 options=() place=() type=()  # busy: the status where a run goes on
case $action in
  create | run | logs | stop | keep) ;;
  *) sed -n '4,10s/^# *//p' "$0"; fail "the action is '$action'; expected create, run, logs, stop or keep" ;;
esac
[[ -n $name && $name != -* && $name != jetflow ]] || fail "$action needs the name of a TPU VM"
shift 2
while (($#)) && [[ $1 != jetflow ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --zone=* | --project=*) place+=("$1") ;;
    *) options+=("$1") ;;
  esac
  shift
done
command=("$@")
case $action in create | keep) read_topology ;; esac
case $action in run | keep) (($#)) || fail "$action needs a command, as in jetflow train --config …" ;; esac
case $action in run | stop) ((!${#options[@]})) || fail "${options[0]} is no option of $action" ;; esac
"$action"
