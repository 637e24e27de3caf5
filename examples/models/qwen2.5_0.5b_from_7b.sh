#!/usr/bin/env bash
# Qwen2.5-0.5B from Qwen2.5-7B, 8 GPUs of 80 GB: eight replicas.
set -euo pipefail
STUDENT=${STUDENT:-models/Qwen2.5-0.5B-Instruct}
TEACHER=${TEACHER:-models/Qwen2.5-7B-Instruct}
source "$(dirname "$0")/common.sh"
LAYOUT=()
launch "$@"
