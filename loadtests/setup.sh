#!/bin/bash
# Makes what bench.py and micro.py measure with, in the scratch folder $BENCH. What is there already is left alone.
# usage: [BENCH=folder] [PYTHON=.venv/bin/python] loadtests/setup.sh [wrk] [models] [mlserver] [triton] [perf_analyzer]     (default: all)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
BENCH=${BENCH:-$HOME/.cache/servinggraph-bench}
PYTHON=${PYTHON:-$here/../.venv/bin/python} # the one that servinggraph is installed for
mkdir -p "$BENCH"

# Every peer runs the model with the onnxruntime that servinggraph runs it with.
onnxruntime=onnxruntime==$("$PYTHON" -c 'from importlib.metadata import version; print(version("onnxruntime"))')

packages() { # NAME...: Debian packages
  apt-get install -y -q "$@" >/dev/null || { apt-get update -q >/dev/null && apt-get install -y -q "$@" >/dev/null; }
}

environment() { # NAME PYTHON REQUIREMENT...: a virtual environment $BENCH/NAME
  local folder=$BENCH/$1 python=$2
  shift 2
  [ -x "$folder/bin/pip" ] || "$python" -m venv "$folder"
  "$folder/bin/pip" install --quiet --disable-pip-version-check "$@"
}

make_wrk() {
  command -v wrk >/dev/null || packages wrk
}

make_models() {
  environment tools "$PYTHON" skl2onnx scikit-learn onnx
  "$BENCH/tools/bin/python" "$here/make_models.py" "$BENCH"
}

make_mlserver() {
  environment mlserver "$PYTHON" mlserver==1.7.1 "uvloop<0.22" "$onnxruntime"
}

make_triton() {
  # The server and its Python backend ship in the wheel; the backend's stub wants Debian's own libpython.
  dpkg -s python3-venv libpython3-dev >/dev/null 2>&1 || packages python3-venv libpython3-dev
  environment triton /usr/bin/python3 nvidia-pytriton==0.7.0 "$onnxruntime"
  local version server
  version=$("$BENCH/triton/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  server=$BENCH/triton/lib/python$version/site-packages/pytriton/tritonserver
  cp "$server/python_backend_stubs/$version/triton_python_backend_stub" "$server/backends/python/"
}

make_perf_analyzer() {
  # Triton's C++ load generator ships in this release of its client; it wants two more libraries.
  packages libb64-0d unzip
  mkdir -p "$BENCH/perf_analyzer"
  (
    cd "$BENCH/perf_analyzer"
    "$PYTHON" -m pip download --no-deps -q -d . tritonclient==2.41.1 nvidia-cuda-runtime-cu12
    for wheel in *.whl; do unzip -o -q "$wheel" -d x; done
    chmod +x x/*.data/data/bin/*
  )
}

[ $# -gt 0 ] || set -- wrk models mlserver triton perf_analyzer
for name in "$@"; do
  echo "setting up $name in $BENCH" >&2
  "make_$name"
done
