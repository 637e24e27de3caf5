#!/usr/bin/env bash
# Qwen2.5-14B from Qwen2.5-72B, 8 GPUs of 80 GB, one replica.
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen2.5-14B-Instruct}
TEACHER=${TEACHER:-models/Qwen2.5-72B-Instruct}
source "$(dirname "$0")/common.sh"
LAYOUT=(
  --tensor-model-parallel-size 8 --sequence-parallel
)
launch "$@"
