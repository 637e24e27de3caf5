#!/usr/bin/env bash
# Starts a server that answers the prompts of train.sh, in the foreground: vLLM or SGLang, which have to be installed
# where this runs (not beside this project: they pin other versions of torch).
#
#   API=sglang STUDENT=/models/Qwen3-1.7B bash examples/rollout_server/serve.sh
#
# Variables:
#   API          vllm or sglang
#   STUDENT      HF directory of the student; the training sends newer weights
#   HOST         address to listen on (default 127.0.0.1; another machine's training needs one that it reaches)
#   PORT         default 8000 (vllm), 30000 (sglang)
#   GPUS         tensor-parallel size (default 1)
#   CONTEXT      longest prompt with its response, in tokens (default 8192)
#   ROLLOUT_KEY  key that requests must carry (default: none); read docs/rollout_servers.md on what it does not protect
#   DRY_RUN=1    print the command, a word a line, without the key
# Further words are flags of the server.
set -euo pipefail

: "${API:?vllm or sglang}" "${STUDENT:?HF directory of the student}"
HOST=${HOST:-127.0.0.1}
GPUS=${GPUS:-1}
CONTEXT=${CONTEXT:-8192}

case $API in
  vllm)
    # Weights are loaded through endpoints of the development mode. Log-probabilities are those at the sampling
    # temperature; without the flag they would be those at temperature 1.
    export VLLM_SERVER_DEV_MODE=1
    if [[ -n ${ROLLOUT_KEY:-} ]]; then
      export VLLM_API_KEY=$ROLLOUT_KEY
    fi
    words=(
      vllm serve "$STUDENT" --host "$HOST" --port "${PORT:-8000}" --tensor-parallel-size "$GPUS"
      --max-model-len "$CONTEXT" --logprobs-mode processed_logprobs
    )
    ;;
  sglang)
    words=(
      python3 -m sglang.launch_server --model-path "$STUDENT" --host "$HOST" --port "${PORT:-30000}" --tp-size "$GPUS"
      --context-length "$CONTEXT"
    )
    ;;
  *)
    echo "API=$API must be vllm or sglang" >&2
    exit 2
    ;;
esac
words+=("$@")
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%s\n' "${words[@]}"
  exit
fi
if [[ $API == sglang && -n ${ROLLOUT_KEY:-} ]]; then
  words+=(--api-key "$ROLLOUT_KEY") # SGLang takes it as a flag: other users of this machine can see it
fi
exec "${words[@]}"
