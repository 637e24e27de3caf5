#!/usr/bin/env bash
# Qwen2.5-32B from Qwen2.5-72B, 2 nodes of 8 GPUs of 80 GB: one replica, a stage on each node.
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen2.5-32B-Instruct}
TEACHER=${TEACHER:-models/Qwen2.5-72B-Instruct}
NODES=${NODES:-2}
source "$(dirname "$0")/common.sh"
LAYOUT=(
  --tensor-model-parallel-size 8 --sequence-parallel
  --pipeline-model-parallel-size 2
)
launch "$@"
