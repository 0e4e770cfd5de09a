#!/usr/bin/env bash
# The batch script of launch/slurm.py: runs a job step, and puts the job back into the queue when its time is nearly up.
#   slurm_job.sh RETRIES COMMAND...      COMMAND is srun with all of its arguments
# SLURM sends USR1 to this script alone (--signal=B:USR1@SECONDS). The trainer gets SIGTERM from here and saves.
set -uo pipefail
retries=$1
shift

warned=0
warn() {
  warned=$((warned + 1))
  echo "slurm_job: the time is nearly up; asking the trainer to save" >&2
  # Not `kill` of srun: that takes SIGTERM as the wish to kill all of its tasks. scancel signals the steps, not this script.
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap warn USR1

# A trap is run when `wait` returns, so the command is in the background; `wait` ends early for the signal.
run() {
  local seen
  "$@" &
  while :; do
    seen=$warned
    wait $!
    code=$?
    [ "$warned" -eq "$seen" ] && return
  done
}

requeue() {
  # Whatever the code is: a save that failed costs the steps since the one before, not the run.
  echo "slurm_job: the step ended with code $code; back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit "$code"
}

tried=0
while :; do
  run "$@"
  [ "$code" -eq 0 ] && exit 0
  [ "$warned" -gt 0 ] && requeue
  case $code in
    2) exit 2 ;;  # a mistake in the configuration stays one
    130 | 143) exit "$code" ;;  # somebody asked the run to end
  esac
  [ "$tried" -ge "$retries" ] && exit "$code"
  tried=$((tried + 1))
  echo "slurm_job: the step ended with code $code; again on the same nodes, $tried of $retries" >&2
  sleep "${MUSICLM_PAUSE:-10}"  # for the coordinator's port, and for what is left of processes
  [ "$warned" -gt 0 ] && requeue
done
