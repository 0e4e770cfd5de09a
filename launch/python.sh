# Sourced by the other scripts: finding a Python that the project supports, and making an environment with it.
# shellcheck shell=bash

# The tests start dozens of processes. Without compiled files each would compile JAX again, for longer than it runs.
export PYTHONDONTWRITEBYTECODE=

# Whether "$1" runs and is Python 3.11 to 3.13. A pyenv shim that is not active exists but fails.
python_fits() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

# Prints the first Python that fits: $PYTHON if set, then by name, then pyenv's.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python \
      "$HOME"/.pyenv/versions/3.1[123]*/bin/python; do
    if python_fits "$candidate"; then
      command -v "$candidate"
      return 0
    fi
  done
  echo "musiclm: error: Python 3.11, 3.12 or 3.13 is needed, and none was found; install one, or name it:" \
    "PYTHON=/path/to/python $0" >&2
  return 1
}

# ensure_environment DIR REQUIREMENT [pip options]: creates the virtual environment DIR if it is missing, and
# installs whenever setup.cfg has changed since the last time.
ensure_environment() {
  local environment=$1 requirement=$2 python stamp
  shift 2
  if [ ! -x "$environment/bin/python" ]; then
    python=$(find_python) || return 1
    "$python" -m venv "$environment" || return 1
  fi
  stamp="$requirement $(cksum < setup.cfg)"
  if [ "$(cat "$environment/.installed" 2>/dev/null)" != "$stamp" ]; then
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check uv || return 1
    UV_PYTHON_DOWNLOADS=never "$environment/bin/uv" pip install --quiet --compile-bytecode \
      --python "$environment/bin/python" "$@" "$requirement" || return 1
    echo "$stamp" > "$environment/.installed"
  fi
}
