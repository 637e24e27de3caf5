#!/usr/bin/env bash
# Llama-3.2-1B from Llama-3.1-8B, 8 GPUs of 80 GB: eight replicas.
set -euo pipefail
STUDENT=${STUDENT:-models/Llama-3.2-1B-Instruct}
TEACHER=${TEACHER:-models/Llama-3.1-8B-Instruct}
source "$(dirname "$0")/common.sh"
LAYOUT=()
launch "$@"
