#!/usr/bin/env bash
# Qwen3-1.7B from Qwen3-14B, 8 GPUs of 80 GB: four replicas of two GPUs.
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen3-1.7B}
TEACHER=${TEACHER:-models/Qwen3-14B}
source "$(dirname "$0")/common.sh"
LAYOUT=(
  --tensor-model-parallel-size 2 --sequence-parallel
)
launch "$@"
