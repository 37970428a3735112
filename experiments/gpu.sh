#!/bin/sh
# What only a GPU can say, in about six minutes: are the kernels exact, how fast are they, where does a step's
# time go. With the folder of another checkout, its speed is measured on the same machine.
#   sh experiments/gpu.sh [../another_checkout]
set -e
python3 -m pytest -q tests/test_kernels.py -k "gpu or triton" || echo "NOT EXACT: nothing below counts"
rows="step abs_topk prune attention profile"
for row in $rows sampling statistics memory; do python3 -m experiments.bench --only=$row; done
if [ -n "$1" ]; then cd "$1" && for row in $rows; do python3 -m experiments.bench --only=$row; done; fi
