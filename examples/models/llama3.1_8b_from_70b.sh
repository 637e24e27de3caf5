#!/usr/bin/env bash
# Llama-3.1-8B from Llama-3.1-70B, 8 GPUs of 80 GB, one replica. Llama 3 8B and 70B take the same layout.
set -euo pipefail
STUDENT=${STUDENT:-models/Llama-3.1-8B-Instruct}
TEACHER=${TEACHER:-models/Llama-3.1-70B-Instruct}
source "$(dirname "$0")/common.sh"
LAYOUT=(
  --tensor-model-parallel-size 8 --sequence-parallel
)
launch "$@"
