#!/usr/bin/env bash
# From nothing to music: makes .venv if it is missing, installs, and runs `musiclm quickstart` with these
# arguments. Start with `launch/quickstart.sh --help`.
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/.."
root=$(pwd)
. launch/python.sh

[ -x .venv/bin/musiclm ] || echo "musiclm: installing into $root/.venv (about 3 GB; a few minutes)" >&2
[ -x .venv/bin/musiclm ] || ensure_environment .venv '.[train]' --editable
cd "$here"
exec "$root/.venv/bin/musiclm" quickstart "$@"
