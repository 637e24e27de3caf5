#!/usr/bin/env bash
# Llama-3.2-1B from Llama-3.1-70B, 8 GPUs of 80 GB: eight replicas of the student, on the same GPUs one teacher cut in eight.
set -euo pipefail
STUDENT=${STUDENT:-models/Llama-3.2-1B-Instruct}
TEACHER=${TEACHER:-models/Llama-3.1-70B-Instruct}
source "$(dirname "$0")/common.sh"
LAYOUT=(
  --teacher-tensor-model-parallel-size 8
)
launch "$@"
