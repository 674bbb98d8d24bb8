#!/usr/bin/env bash
# One entry for everything: sets up the environment on first use, then runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'TEXT'
./launch.sh demo [--control] [key=value ...]      train a small model from scratch and print accuracy per stage
./launch.sh test [pytest arguments]               the whole test suite
./launch.sh check                                 ruff and mypy
./launch.sh RUN.yaml [--dry-run] [key=value ...]  a run, on the GPUs found, else on CPU ranks
./launch.sh eval CHECKPOINT [key=value ...]       evaluate a checkpoint of a run folder
./launch.sh sweep FILE                            a list of runs one after another, without those that are finished
./launch.sh setup                                 only make the environment

--verbose        after demo, RUN.yaml or eval: show what libraries print, which goes to run.log otherwise
RANKS=N          number of ranks (default: every GPU; without a GPU 2, or 1 on one core)
MASTER_PORT=N    another port than 29500, for a second run on the same machine
PYTHON=python3   interpreter for the environment .venv; an active virtual or conda environment is used as it is
TORCH_INDEX_URL  package index for torch alone, for machines without a GPU whose index has only CUDA builds
TEXT
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

rank_count() {
  if [[ -n "${RANKS:-}" ]]; then
    echo "$RANKS"
  elif has_gpu; then
    nvidia-smi -L | grep -c '^GPU'
  else
    local cores
    cores=$(getconf _NPROCESSORS_ONLN)
    echo $((cores < 2 ? 1 : 2))
  fi
}

check_machine() {
  command -v "$1" >/dev/null || fail "no $1: install Python 3.10 to 3.13, or set PYTHON to one"
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
    fail "$("$1" --version) is not supported: set PYTHON to a Python from 3.10 to 3.13"
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
  # Operators of their own for each environment: in the shared cache two environments would rebuild each other's.
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$prefix/torch_extensions}
  state=$(cat constraints.txt setup.cfg | cksum)
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$state" ]]; then
    install_packages
    echo "$state" >"$stamp"
  fi
  if ! has_gpu; then
    export DS_ACCELERATOR=cpu
    build_operators
  fi
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
  [[ -n "${TORCH_INDEX_URL:-}" ]] && index=(--index-url "$TORCH_INDEX_URL")
  if ! has_gpu && "$@" "${index[@]}" --dry-run --no-deps --report - "$pinned" 2>/dev/null | grep -Eq '"(nvidia|cuda)-'; then
    fail "no GPU here, and $pinned would bring gigabytes of CUDA packages; set TORCH_INDEX_URL to the index of PyTorch's" \
      "CPU builds (pytorch.org, Get Started, Compute Platform CPU), or install the torch you want first"
  fi
  echo "installing $pinned"
  "$@" "${index[@]}" "$pinned"
}

# Built once here, where the time is seen, and not by all ranks at once.
build_operators() {
  local stamp=$TORCH_EXTENSIONS_DIR/.built
  [[ -f "$stamp" ]] && return
  echo "building DeepSpeed's CPU operators (about two minutes, once)"
  local log
  log=$(mktemp)
  # Waits without end for a lock file that a killed build has left, and names it.
  python -m coconut_ds.engine.operator_build "$log" || {
    tail -n 20 "$log" >&2
    fail "DeepSpeed could not build its CPU operators, see above"
  }
  rm -f "$log"
  touch "$stamp"
}

start_run() {
  local options=(--num_gpus "$(rank_count)")
  # Two runs on one machine need a port each.
  [[ -n "${MASTER_PORT:-}" ]] && options+=(--master_port "$MASTER_PORT")
  if [[ " $* " != *" --verbose "* ]]; then
    options+=(--quiet)
  fi
  local command=(deepspeed "${options[@]}" coconut_ds/train.py --run "$@")
  [[ " $* " != *" --verbose "* ]] || printf '+%s\n' "$(printf ' %q' "${command[@]}")"
  # In a session of its own: DeepSpeed's launcher answers a signal by ending its ranks, so only they get it.
  setsid "${command[@]}" &
  launcher=$! asked=0
  trap end_run INT TERM HUP
  wait_for "$launcher"
}

# The status of a background process; a signal that has a trap interrupts `wait` and not this.
wait_for() {
  local status=0
  while kill -0 "$1" 2>/dev/null; do
    wait "$1" && status=0 || status=$?
  done
  return "$status"
}

# The first signal lets the ranks save, or ends everything where there are none yet; the second one ends it at once.
end_run() {
  ((asked)) && kill -KILL -- "-$launcher"
  asked=1
  pkill -TERM --session "$launcher" --full -- '--local_rank=' || kill -TERM -- "-$launcher"
}

demo() {
  local name=demo control=() rest=() verbose=()
  for argument in "$@"; do
    case "$argument" in
      --control)
        name=demo_control
        control=(method=no_cot latent_context=null)
        ;;
      --verbose) verbose=(--verbose) ;;
      *=*) rest+=("$argument") ;;
      *) fail "demo: $argument is neither --control, --verbose nor key=value" ;;
    esac
  done
  if [[ ! -f data/demo/prosqa_train.json ]]; then
    python preprocessing/prosqa.py generate --out data/demo --form edges \
      --nodes 7 --min-steps 2 --max-steps 2 --train 19200 --valid 500 --test 500 >/dev/null
  fi
  # Its 64 examples a step are two micro-batches of 32.
  (($(rank_count) > 2)) && RANKS=2
  local run=(run_configs/demo.yaml "name=$name" "${control[@]}" "${rest[@]}")
  start_run "${run[@]}" "${verbose[@]}"
  # Values are YAML, so the configuration says which folder they name.
  local folder
  folder=$(python -c 'import sys
from coconut_ds.config.run_file import load_run_config
print(load_run_config(sys.argv[1], sys.argv[2:]).run_folder)' "${run[@]}")
  python -m coconut_ds.report "$folder"
}

# Each run is a process of its own, so that a signal reaches the one under way, and no other starts after it.
sweep() {
  [[ $# -eq 1 ]] || fail "sweep: name one file with a run a line, such as run_configs/demo_comparison.txt"
  local pending line failed=0
  pending=$(python -m coconut_ds.sweep "$1")
  asked=0 run=
  trap 'asked=1; [[ -z "$run" ]] || kill -TERM "$run" 2>/dev/null || true' INT TERM HUP
  while read -r line && ((!asked)); do
    [[ -n "$line" ]] || continue
    local words
    # Quoted by Python's shlex.
    eval "words=($line)"
    # In a session of its own, so that a signal to all of this group reaches it once, through the trap.
    setsid ./launch.sh "${words[@]}" </dev/null &
    run=$!
    wait_for "$run" || {
      echo "failed: $line" >&2
      failed=1
    }
    run=
  done <<<"$pending"
  ((asked)) && echo "stopped as requested; the same command resumes"
  exit "$failed"
}

# A checkpoint lies in RUN_FOLDER/checkpoints/, and the run folder says how it was trained.
evaluate() {
  [[ $# -ge 1 && -d "$1" ]] || fail "eval: ${1:-nothing} is no checkpoint folder; name one such as runs/demo/checkpoints/epoch_0014"
  local checkpoint=${1%/} run_file
  shift
  run_file=$(dirname "$(dirname "$checkpoint")")/run_config.yaml
  [[ -f "$run_file" ]] ||
    fail "eval: no $run_file beside $checkpoint; for other weights use ./launch.sh RUN.yaml only_eval=true load_model_path=..."
  # In YAML's quotes, so that the value is this text whatever is in it.
  local quote="'"
  start_run "$run_file" only_eval=true "load_model_path='${checkpoint//$quote/$quote$quote}'" resume=0 "$@"
}

case "${1:-help}" in
  help | -h | --help) usage ;;
  setup) enter_environment ;;
  demo)
    shift
    enter_environment
    demo "$@"
    ;;
  test)
    shift
    enter_environment
    exec python -m pytest "$@"
    ;;
  check)
    enter_environment
    ruff check . && ruff format --check . && mypy
    ;;
  eval)
    shift
    enter_environment
    evaluate "$@"
    ;;
  sweep)
    shift
    enter_environment
    sweep "$@"
    ;;
  *.yaml | *.yml)
    [[ -f "$1" ]] || fail "no such run file: $1"
    enter_environment
    start_run "$@"
    ;;
  *) fail "unknown command '$1'; ./launch.sh help lists them" ;;
esac
