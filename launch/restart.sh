#!/usr/bin/env bash
# Runs a command until its work is done. What a crash cut off goes on in the same workdir:
#
#   launch/restart.sh jetflow train --config configs/NAME.py --workdir DIR
#
# The command's status decides: 0 (done), 2 (bad input), 3 (the loss is not finite), 130 and 143 (told
# to stop, and all is saved) end it; any other is a crash, and the command is run again. TRIES crashes
# without a new checkpoint between them, however long each took, end it as well. Ctrl-C, SIGTERM and
# SIGHUP reach the command as one SIGTERM, so that it saves.
set -uo pipefail

PAUSE=${PAUSE:-10}  # seconds before another start
TRIES=${TRIES:-5}

(($#)) || { echo "restart.sh: no command; expected launch/restart.sh jetflow train …" >&2; exit 2; }

workdir=$(printf '%s\n' "$@" | sed -n 's/^--workdir=//p; /^--workdir$/{n;p;}')
newest_checkpoint() {  # its step, or nothing; one that is being written has another name
  cd "$workdir/checkpoints" 2>/dev/null && printf '%s\n' * | grep -x '[0-9]*' | sort -n | tail -n 1
}

finish() {
  [[ -z ${STATUS_FILE:-} ]] || echo "$1" >"$STATUS_FILE"
  exit "$1"
}

stopping=
child=
trap 'stopping=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM INT HUP

crashes=0
before=
while true; do
  set -m  # in a group of its own: a terminal sends Ctrl-C to all of ours, and it would come twice
  "$@" </dev/null &
  child=$!
  set +m
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal ends `wait` before the command has saved
    wait "$child"
    status=$?
  done
  child=
  case $status in 0 | 2 | 3 | 130 | 143) finish "$status" ;; esac
  [[ -z $stopping ]] || finish "$status"
  now=$(newest_checkpoint)
  if [[ $now == "$before" ]]; then ((crashes += 1)); else crashes=1; fi
  before=$now
  if ((crashes >= TRIES)); then
    echo "restart.sh: $crashes crashes without a new checkpoint (status $status), giving up" >&2
    finish "$status"
  fi
  echo "restart.sh: status $status at $(date -u +%FT%TZ), again in $PAUSE s" >&2
  sleep "$PAUSE" &
  wait $!
  [[ -z $stopping ]] || finish 143
done
