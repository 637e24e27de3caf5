#!/usr/bin/env bash
# Stands in for python in `python -m megatron_taopd launch local … --run-again-file FILE -- train …`, where a test is about
# the batch script and SLURM alone. What it does on the first start: MODE=wait until told to stop, then pretend a
# checkpoint; MODE=stuck the same without one; MODE=fail on the second node; MODE=die the same by SIGKILL, after a
# checkpoint; MODE=refuse the same with status 2 on the first node, of which the second gets to know as a failure. It
# finishes when it is started again.
while [[ $1 != --run-again-file ]]; do shift; done
run_again=$2
echo "start ${SLURM_RESTART_COUNT:-0} of node $SLURM_NODEID on $SLURMD_NODENAME: $*"

checkpoint() {
  mkdir -p "$SAVE"
  echo 7 > "$SAVE/latest_checkpointed_iteration.txt"
}

stop() {
  echo "asked to stop: $1"
  if [[ $MODE == wait ]]; then
    checkpoint
  fi
  touch "$run_again"
  exit 0
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

# srun's signal is lost on a node that has not started yet.
other_has_started() {
  until grep -q "start 0 of node $((1 - SLURM_NODEID))" "${run_again%.run-again}.attempt-0.log"; do sleep 0.1; done
}

if [[ ${SLURM_RESTART_COUNT:-0} != 0 ]]; then
  exit 0
elif [[ $MODE == fail && $SLURM_NODEID == 1 ]]; then
  other_has_started
  exit 3
elif [[ $MODE == die && $SLURM_NODEID == 1 ]]; then
  other_has_started
  checkpoint
  kill -KILL $$
elif [[ $MODE == refuse ]]; then
  trap 'exit 143' TERM
  if [[ $SLURM_NODEID == 0 ]]; then
    other_has_started
    checkpoint
    touch "$run_again.refused"
    exit 2
  fi
fi
while true; do sleep 0.1; done
