#!/usr/bin/env bash
# Runs the tests in .venv, which is made if it is missing.
#   launch/test.sh            the fast suite
#   launch/test.sh --slow     the slow suite
#   launch/test.sh --all      both, and the hours-long ones
# Everything after that goes to pytest: launch/test.sh --slow -k codec -n 4
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/python.sh

selection='not slow and not soak'
case "${1:-}" in
  --slow) selection='slow and not soak'; shift ;;
  --all) selection=''; shift ;;
  -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac

ensure_environment .venv '.[dev]' --editable
exec .venv/bin/python -m pytest ${selection:+-m "$selection"} "$@"
