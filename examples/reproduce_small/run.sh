#!/bin/bash
# The whole reproduction, from the root of the repository; what is done already is kept, so the same command goes on
# after an interruption, from the committed records if there are some. Several may run at once: they share the runs.
#   bash examples/reproduce_small/run.sh [near|far|far-reverse ...]
set -euo pipefail
here=examples/reproduce_small
build=build/reproduce_small
python=${PYTHON:-python}
export OMP_NUM_THREADS=1
[ $# -gt 0 ] || set -- near far far-reverse

"$python" $here/prepare.py --out $build
plots=()
for regime in "$@"; do
    packed=docs/reproduction/$regime.jsonl
    [ ! -f "$packed" ] || "$python" $here/results.py unpack "$packed" "$build/$regime/suite"
    "$python" $here/control.py "$here/${regime%-reverse}.yaml"  # far-reverse has the control of far
    "$python" -m megatron_taopd suite run --suite "$here/$regime.yaml" --out "$build/$regime/suite"
    "$python" $here/results.py pack "$build/$regime/suite" "$packed"
    cp "$build/$regime/suite/table.md" "docs/reproduction/$regime.md"
    plots+=("$regime=$build/$regime/suite")
done
"$python" $here/results.py plot --out docs/reproduction/comparison.png "${plots[@]}"
