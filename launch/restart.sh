#!/usr/bin/env bash
# Runs a command until its work is done. What a crash cut off goes on in the same workdir:
#
#   launch/restart.sh jetflow train --config configs/NAME.py --workdir DIR
#
# The statuses 0 (done), 2 (bad input), 3 (the loss is not finite), 130 and 143 (told to stop, and all is
# saved) end it; any other is a crash. TRIES crashes without a new checkpoint between them end it as well.
# Ctrl-C, SIGTERM and SIGHUP reach the command as one SIGTERM, so that it saves. With --dry-run as its first
# word it prints the command, and does nothing.
set -uo pipefail
[[ ${1:-} != --dry-run ]] || { shift; echo "restart.sh: until it is done: $*"; exit; }
(($#)) || { echo "restart.sh: no command; expected launch/restart.sh jetflow train …" >&2; exit 2; }

workdir=$(printf '%s\n' "$@" | sed -n 's/^--workdir=//p; /^--workdir$/{n;p;}')
newest_checkpoint() {  # its step, or nothing; of a folder or a bucket
  python -c 'import sys; from etils import epath
print(max(int(path.name) for path in epath.Path(sys.argv[1], "checkpoints").iterdir() if path.name.isdigit()))
' "$workdir" 2>/dev/null
}

stopping='' child='' crashes=0 before=''
trap 'stopping=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM INT HUP
until [[ -n $stopping ]]; do
  set -m  # in a group of its own: a terminal sends Ctrl-C to all of ours, and it would come twice
  "$@" </dev/null &
  child=$!
  set +m
  wait "$child"; status=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done  # a signal ends the first early
  child=
  case $status in 0 | 2 | 3 | 130 | 143) break ;; esac
  now=$(newest_checkpoint)
  if [[ $now == "$before" ]]; then ((crashes += 1)); else crashes=1; fi
  before=$now
  if ((crashes >= ${TRIES:-5})); then
    echo "restart.sh: $crashes crashes without a new checkpoint (status $status), giving up" >&2
    break
  fi
  echo "restart.sh: status $status at $(date -u +%FT%TZ), again in ${PAUSE:-10} s" >&2
  sleep "${PAUSE:-10}" &
  wait $!
done
[[ -z ${STATUS_FILE:-} ]] || echo "$status" >"$STATUS_FILE"
exit "$status"
