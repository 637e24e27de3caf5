#!/usr/bin/env bash
# Qwen3-14B from Qwen3-32B, 8 GPUs of 80 GB, one replica.
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen3-14B}
TEACHER=${TEACHER:-models/Qwen3-32B}
source "$(dirname "$0")/common.sh"
LAYOUT=(
  --tensor-model-parallel-size 8 --sequence-parallel
)
launch "$@"
