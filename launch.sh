#!/usr/bin/env bash
# Sets up the environment on first use, then hands over to `python -m coconut_ds`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Asked for torch on a machine without a GPU if the package index has only CUDA builds.
CPU_INDEX=https://download.pytorch.org/whl/cpu

usage() {
  cat <<'TEXT'
./launch.sh demo [--control] [key=value ...]      train a small model from scratch and print accuracy per stage
./launch.sh test [pytest arguments]               the whole test suite
./launch.sh check                                 ruff and mypy
./launch.sh RUN.yaml [--dry-run] [key=value ...]  train a run on every GPU, or on CPU ranks without one
./launch.sh eval CHECKPOINT [key=value ...]       evaluate a checkpoint of a run folder
./launch.sh sweep FILE                            train a list of runs one after another, except finished ones
./launch.sh VERB ...                              python -m coconut_ds VERB: plan, ask, compare, report, inspect, export
./launch.sh setup                                 only make the environment

--help           after a verb: all its options
--verbose        after demo, RUN.yaml, eval or sweep: show what libraries print, which goes to run.log otherwise
RANKS=N          number of ranks (default: every GPU; without a GPU 2, or 1 on a single core)
MASTER_PORT=N    another port than 29500, for a second run on the same machine
PYTHON=python3   interpreter for the environment .venv; an active virtual or conda environment is used as it is
TORCH_INDEX_URL  package index for torch alone (default: pip's; without a GPU PyTorch's CPU builds if pip's has none)
TEXT
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

check_machine() {
  command -v "$1" >/dev/null || fail "no $1: install Python 3.11 to 3.13, or set PYTHON to one"
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    fail "$("$1" --version) is not supported: set PYTHON to a Python from 3.11 to 3.13"
  command -v c++ >/dev/null || command -v g++ >/dev/null ||
    fail "no C++ compiler: DeepSpeed builds its CPU optimizer on first use; install g++ (Debian: apt-get install g++)"
  "$1" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' ||
    fail "no Python.h: DeepSpeed builds against it; install the headers of $("$1" --version) (Debian: python3-dev)"
}

# The environment: an active one, else .venv; packages are installed once per state of constraints.txt and setup.cfg.
enter_environment() {
  local python=${PYTHON:-python3}
  if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    if [[ ! -x .venv/bin/python ]]; then
      check_machine "$python"
      local see_torch=()
      # A torch that is installed already is kept.
      "$python" -c 'import torch' 2>/dev/null && see_torch=(--system-site-packages)
      "$python" -m venv "${see_torch[@]}" .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  check_machine python
  local prefix stamp state
  prefix=$(python -c 'import sys; print(sys.prefix)')
  stamp="$prefix/.coconut_ds"
  # One folder of operators per environment: in the shared cache two environments would rebuild each other's.
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$prefix/torch_extensions}
  state=$(cat constraints.txt setup.cfg | cksum)
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$state" ]]; then
    install_packages
    echo "$state" >"$stamp"
  fi
  has_gpu || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
  build_operators
}

install_packages() {
  local pip=(python -m pip --disable-pip-version-check install --quiet)
  python -c 'import torch' 2>/dev/null || install_torch "${pip[@]}"
  local pins torch
  pins=$(mktemp)
  torch=$(python -c 'from importlib.metadata import version; print(version("torch").split("+")[0])')
  { grep -v '^torch==' constraints.txt && echo "torch==$torch"; } >"$pins"
  echo "installing packages beside torch $torch"
  "${pip[@]}" --constraint "$pins" --editable '.[dev]'
  rm -f "$pins"
}

# torch comes first and at the pinned version: anything that depends on it would bring the newest CUDA build.
install_torch() {
  local index=() pinned
  pinned=$(grep '^torch==' constraints.txt)
  [[ -z "${TORCH_INDEX_URL:-}" ]] || index=(--index-url "$TORCH_INDEX_URL")
  if ! has_gpu && brings_cuda "$@" "${index[@]}" "$pinned"; then
    [[ -z "${TORCH_INDEX_URL:-}" ]] || fail "no GPU here, and $pinned of TORCH_INDEX_URL ($TORCH_INDEX_URL) would bring" \
      "gigabytes of CUDA packages; name an index of CPU builds"
    echo "no GPU here, and the package index has only CUDA builds of $pinned: asking $CPU_INDEX"
    "$@" --retries 1 --index-url "$CPU_INDEX" "$pinned" && return
    fail "no CPU build of $pinned came from $CPU_INDEX, and the package index would bring gigabytes of CUDA packages;" \
      "set TORCH_INDEX_URL to an index of CPU builds that can be reached here, or install the torch you want first"
  fi
  echo "installing $pinned"
  "$@" "${index[@]}" "$pinned"
}

brings_cuda() { "$@" --dry-run --no-deps --report - 2>/dev/null | grep -Eq '"(nvidia|cuda)-'; }

# Built once here, where the time is seen, and not by all ranks at once.
build_operators() {
  local stamp=$TORCH_EXTENSIONS_DIR/.built log
  [[ -f "$stamp" ]] && return
  echo "building DeepSpeed's CPU operators (about two minutes, once)"
  log=$(mktemp)
  # Waits without end for a lock file that a killed build has left, and names it.
  python -m coconut_ds.engine.operator_build "$log" || {
    tail -n 20 "$log" >&2
    fail "DeepSpeed could not build its CPU operators, see above"
  }
  rm -f "$log"
  touch "$stamp"
}

case "${1:-help}" in
  help | -h | --help) usage ;;
  setup) enter_environment ;;
  test)
    shift
    enter_environment
    # Workers with whole files, one more than half of the tests' waiting for processes fills; -n 0 is for a debugger.
    exec python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder "$@"
    ;;
  check)
    enter_environment
    ruff check . && ruff format --check . && mypy
    ;;
  train | eval | demo | sweep | plan | ask | compare | report | inspect | export)
    enter_environment
    exec python -m coconut_ds "$@"
    ;;
  *.yaml | *.yml)
    [[ -f "$1" ]] || fail "no such run file: $1"
    enter_environment
    exec python -m coconut_ds train --run "$@"
    ;;
  *) fail "unknown command '$1'; ./launch.sh help lists them" ;;
esac
