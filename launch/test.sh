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
fast='not slow and not soak'
selection=$fast
workers=(-n 2 --dist worksteal)
case "${1:-}" in
  --slow) selection='slow and not soak'; shift ;;
  --all) selection=''; shift ;;
  -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac

ensure_environment .venv '.[dev]' --editable
if [ "$selection" != "$fast" ]; then
  # Plans for TPUs need their compiler. It lies beside the packages: among them, every command would look for TPUs first.
  wanted=$(.venv/bin/python -c 'from importlib.metadata import requires
print(next(line.partition(";")[0] for line in requires("jax") if line.startswith("libtpu")))')
  if UV_PYTHON_DOWNLOADS=never .venv/bin/uv pip install --quiet --no-deps --python .venv/bin/python \
      --target .venv/tpu "$wanted"; then
    export PYTHONPATH=$PWD/.venv/tpu${PYTHONPATH:+:$PYTHONPATH}
  else
    echo "launch/test.sh: $wanted cannot be installed here; tests of plans for TPUs are skipped" >&2
  fi
fi
# XLA on CPU takes and gives back large buffers all the time: with huge pages that are kept it is much faster.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=4000000000}
exec .venv/bin/python -m pytest "${workers[@]}" --durations=20 ${selection:+-m "$selection"} "$@"
