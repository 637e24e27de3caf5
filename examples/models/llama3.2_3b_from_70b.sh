#!/usr/bin/env bash
# Llama-3.2-3B from Llama-3.1-70B, 8 GPUs of 80 GB, one replica.
set -euo pipefail
STUDENT=${STUDENT:-models/Llama-3.2-3B-Instruct}
TEACHER=${TEACHER:-models/Llama-3.1-70B-Instruct}
source "$(dirname "$0")/common.sh"
LAYOUT=(
  --tensor-model-parallel-size 8 --sequence-parallel
)
launch "$@"
