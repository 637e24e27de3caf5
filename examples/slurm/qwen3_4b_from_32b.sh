#!/usr/bin/env bash
# Qwen3-4B from Qwen3-32B on 8 nodes of 8 GPUs of 80 GB: sixteen replicas of four
# GPUs, each with the layout of ../models/qwen3_4b_from_32b.sh.
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen3-4B}
TEACHER=${TEACHER:-models/Qwen3-32B}
NODES=${NODES:-8}
here=$(dirname "$0")
source "$here/../models/common.sh"
source "$here/common.sh"
LAYOUT=(
  --tensor-model-parallel-size 4 --sequence-parallel
)
submit slurm "$@"
