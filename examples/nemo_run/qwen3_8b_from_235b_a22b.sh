#!/usr/bin/env bash
# Qwen3-8B from the mixture Qwen3-235B-A22B on 4 nodes of 8 GPUs of 80 GB, through nemo-run: two stages,
# four replicas of eight GPUs, whole experts (ETP 1) of the teacher dealt over the sixteen GPUs of a stage.
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen3-8B}
TEACHER=${TEACHER:-models/Qwen3-235B-A22B}
NODES=${NODES:-4}
here=$(dirname "$0")
source "$here/../models/common.sh"
source "$here/../slurm/common.sh"
# nemo-run's job runs in a directory of its own.
for name in STUDENT TEACHER PROMPT_DATA OUTPUT; do
  declare "$name=$(realpath -m "${!name}")"
done
LAYOUT=(
  --tensor-model-parallel-size 4 --sequence-parallel
  --pipeline-model-parallel-size 2
  --expert-model-parallel-size 16 --expert-tensor-parallel-size 1
)
submit nemo-run "$@"
