#!/usr/bin/env bash
# Runs a command until its work is done. What a crash cut off goes on in the same workdir:
#
#   launch/restart.sh jetflow train --config configs/NAME.py --workdir DIR
#
# The command's status decides: 0 (done), 2 (bad input), 3 (the loss is not finite), 130 and 143 (told
# to stop, and all is saved) end it; any other is a crash, and the command is run again. Three crashes
# within QUICK seconds of a start, one after another, end it as well. SIGTERM is passed on, so that
# the command saves.
set -uo pipefail

PAUSE=${PAUSE:-10}  # seconds before another start
QUICK=${QUICK:-120}

(($#)) || { echo "restart.sh: no command; expected launch/restart.sh jetflow train …" >&2; exit 2; }

finish() {
  [[ -z ${STATUS_FILE:-} ]] || echo "$1" >"$STATUS_FILE"
  exit "$1"
}

stopping=
child=
trap 'stopping=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM INT

crashes=0
while true; do
  started=$SECONDS
  "$@" &
  child=$!
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal ends `wait` before the command has saved
    wait "$child"
    status=$?
  done
  child=
  case $status in 0 | 2 | 3 | 130 | 143) finish "$status" ;; esac
  [[ -z $stopping ]] || finish "$status"
  if ((SECONDS - started < QUICK)); then ((crashes += 1)); else crashes=0; fi
  if ((crashes == 3)); then
    echo "restart.sh: three crashes in a row (status $status), giving up" >&2
    finish "$status"
  fi
  echo "restart.sh: status $status at $(date -u +%FT%TZ), again in $PAUSE s" >&2
  sleep "$PAUSE" &
  wait $!
  [[ -z $stopping ]] || finish 143
done
