#!/usr/bin/env bash
# Makes .venv with the Python given. Debian keeps the venv module's pip in a package of its own.
set -eu
python=$1
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "servinggraph needs Python 3.11 or later; $python is older. make PYTHON=python3.11 ..." >&2; exit 1; }
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
  if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
  else
    echo "please install Python's venv: sudo apt-get install python3-venv" >&2; exit 1
  fi
fi
"$python" -m venv .venv
