#!/usr/bin/env bash
# One training step of the smallest MuLan on the built-in music: launch/one_step.sh path/to/musiclm WORKDIR
set -euo pipefail
musiclm=$1 workdir=$2
mkdir -p "$workdir"
cd "$workdir"  # so that the installed package is used, not this source tree
JAX_PLATFORMS=cpu "$musiclm" train --gin_file experiments/mulan.gin --gin_file size/nano.gin \
  --gin.NUM_STEPS=1 --workdir "$workdir/mulan"
test -s "$workdir/mulan/metrics.jsonl"
