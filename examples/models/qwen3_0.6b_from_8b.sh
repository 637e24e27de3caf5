#!/usr/bin/env bash
# Qwen3-0.6B from Qwen3-8B, 8 GPUs of 80 GB: eight replicas.
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen3-0.6B}
TEACHER=${TEACHER:-models/Qwen3-8B}
source "$(dirname "$0")/common.sh"
LAYOUT=()
launch "$@"
