# What the launch files of this directory and of ../nemo_run share; sourced, not run, after ../models/common.sh, whose
# lists and variables (STUDENT, TEACHER, PROMPT_DATA, OUTPUT, GPUS_PER_NODE) it uses. A launch file sets NODES and LAYOUT
# and calls `submit slurm "$@"` or `submit nemo-run "$@"`.
#
# Variables (all can be set in the environment):
#   ACCOUNT, PARTITION, QOS   default: the cluster's
#   TIME                      time limit of a job, which queues again until training is done (default 4:00:00)
#   CPUS_PER_NODE             cores that a job takes on a node (default 64)
#   CONTAINER_IMAGE           image for pyxis; CONTAINER_MOUNTS its mounts, SOURCE:TARGET separated by blanks
#   SETUP_SCRIPT              shell file to source first: modules, a virtual environment (slurm alone)
#   DRY_RUN=1                 check everything and print the batch script, submit nothing
# Words after the file's name are flags of `taopd train` and win.
# shellcheck shell=bash

TIME=${TIME:-4:00:00}
CPUS_PER_NODE=${CPUS_PER_NODE:-64}

submit() {
  local where=$1 words mount
  shift
  train_words "$@"
  words=(
    taopd launch "$where"
    --nodes "$NODES" --nproc-per-node "$GPUS_PER_NODE" --cpus-per-task "$CPUS_PER_NODE" --exclusive --time "$TIME"
  )
  if [[ $where == nemo-run ]]; then
    words+=(--executor slurm)
  fi
  if [[ -n ${ACCOUNT:-} ]]; then
    words+=(--account "$ACCOUNT")
  fi
  if [[ -n ${PARTITION:-} ]]; then
    words+=(--partition "$PARTITION")
  fi
  if [[ -n ${QOS:-} ]]; then
    words+=(--qos "$QOS")
  fi
  if [[ -n ${SETUP_SCRIPT:-} ]]; then
    words+=(--setup-script "$SETUP_SCRIPT")
  fi
  if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    words+=(--container pyxis --container-image "$CONTAINER_IMAGE")
    for mount in ${CONTAINER_MOUNTS:-}; do
      words+=(--container-mounts "$mount")
    done
  fi
  if [[ -n ${DRY_RUN:-} ]]; then
    words+=(--dry-run)
  fi
  "${words[@]}" -- "${TRAIN[@]}"
}
