#!/usr/bin/env bash
# Runs the tests in .venv, which is made if it is missing.
#   launch/test.sh            the fast suite
#   launch/test.sh --slow     the slow suite
#   launch/test.sh --all      both, and the hours-long ones
# Everything after that goes to pytest: launch/test.sh --slow -k codec
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/python.sh

# Two workers; who is done first takes over tests of the other.
selection='not slow and not soak'
workers=(-n 2 --dist worksteal)
case "${1:-}" in
  --slow) selection='slow and not soak'; shift ;;
  --all) selection=''; shift ;;
  -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac

ensure_environment .venv '.[dev]' --editable
# XLA on CPU takes and gives back large buffers all the time: with huge pages that are kept it is much faster.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=4000000000}
exec .venv/bin/python -m pytest "${workers[@]}" --durations=20 ${selection:+-m "$selection"} "$@"
