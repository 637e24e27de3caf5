#!/usr/bin/env bash
# The whole of it on a laptop: random models, a small server that speaks as SGLang and vLLM do in the place of theirs
# (megatron_taopd/testing/rollout_server.py), and four steps of train.sh.
#
#   bash examples/rollout_server/on_cpu.sh [OUTPUT]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
output=${1:-build/rollout_server}
mkdir -p "$output"

python3 - "$output" <<'PYTHON'
import json, pathlib, sys
from megatron_taopd.testing.tiny_models import save_tiny_hf_model

root = pathlib.Path(sys.argv[1])
save_tiny_hf_model(root / "student", "qwen3", num_layers=2, seed=1)
save_tiny_hf_model(root / "teacher", "qwen3", num_layers=4, seed=2)
prompts = [{"id": f"p{i}", "prompt_tokens": [10 + i, 20 + i, 30 + i]} for i in range(32)]
(root / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
PYTHON

python3 -m megatron_taopd.testing.rollout_server "$output/student" >"$output/server.log" 2>&1 &
server=$!
trap 'kill "$server"' EXIT
until url=$(grep -o 'http://127[^ ]*' "$output/server.log"); do
  kill -0 "$server" || { cat "$output/server.log"; exit 1; }
  sleep 0.2
done
echo "== $url"

API=${API:-sglang} URL=$url STUDENT=$output/student TEACHER=$output/teacher PROMPT_DATA=$output/prompts.jsonl \
  OUTPUT=$output/run RANKS=0 EVERY=2 bash "$here/train.sh" \
  --max-prompt-length 64 --max-response-length 16 --global-batch-size 16 --train-iters 4 --lr 1e-3 \
  --load "$output/run/checkpoints" --save-interval 4
