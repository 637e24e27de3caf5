#!/bin/bash
# The whole reproduction, from the root of the repository; what is done already is kept, so the same command goes on
# after an interruption, from the committed records if there are some. Several may run at once: they share the runs.
#   bash examples/reproduce_small/run.sh [near|far|far-reverse ...]
set -euo pipefail
here=examples/reproduce_small
build=build/reproduce_small
docs=docs/reproduction
python=${PYTHON:-python}
export OMP_NUM_THREADS=1
all=(near far far-reverse)
[ $# -gt 0 ] || set -- "${all[@]}"

# Make the runs of suite file $2 that are not there; records, table and page have the name $1.
compare() {
    [ ! -f "$docs/$1.jsonl" ] || "$python" $here/results.py unpack "$docs/$1.jsonl" "$build/$1/suite"
    # Status 1: some runs failed; the table says which, and the others are reported.
    "$python" -m megatron_taopd suite run --suite "$2" --out "$build/$1/suite" || [ $? -eq 1 ]
    "$python" $here/results.py pack "$build/$1/suite" "$docs/$1.jsonl"
    cp "$build/$1/suite/table.md" "$docs/$1.md"
    if grep -q '^  teachability:' "$2"; then  # differences from it, too, each at its own budget
        "$python" -m megatron_taopd suite table --out "$build/$1/suite" --baseline teachability > /dev/null
        cp "$build/$1/suite/table-versus-teachability.md" "$docs/$1-versus-teachability.md"
    fi
    "$python" -m megatron_taopd report --suite "$build/$1/suite" --title "$1"
}

"$python" $here/prepare.py --out $build
for regime in "$@"; do
    "$python" $here/control.py "$here/${regime%-reverse}.yaml"  # far-reverse has the control of far
    compare "$regime" "$here/$regime.yaml"
    # What ended above the untrained student is repeated at a third of the smallest rate before it is called collapsed.
    again=$build/$regime-collapse.yaml
    "$python" $here/results.py collapsed "$build/$regime/suite" "$again"
    [ ! -f "$again" ] || compare "$regime-collapse" "$again"
done
plots=()
for regime in "${all[@]}"; do plots+=("$regime=$build/$regime/suite"); done
"$python" $here/results.py plot --out $docs/comparison.png "${plots[@]}"
