#!/bin/sh
# Unpack Transformer Engine's Python wheel (0.7 MB, no CUDA) into build/transformer_engine, for tests/fp8/test_reference.py.
# It is not installed: a partly installed Transformer Engine breaks megatron-core on a CPU.
#
#     tools/fetch_transformer_engine.sh [FOLDER]        PYTHON=… another interpreter, PIP_ARGS=… further pip arguments
set -eu
cd "$(dirname "$0")/.."
folder=${1:-build/transformer_engine}
wheel=$(mktemp -d)
trap 'rm -rf "$wheel"' EXIT
# shellcheck disable=SC2086
"${PYTHON:-python3}" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: ${PIP_ARGS:-} \
    --dest "$wheel" transformer-engine==2.11.0
rm -rf "$folder"
mkdir -p "$folder"
"${PYTHON:-python3}" -m zipfile --extract "$wheel"/transformer_engine-*.whl "$folder"
echo "$folder"
