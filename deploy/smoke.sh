#!/usr/bin/env bash
# Build the images, start a fleet with two workers, ask through both, kill one in the middle of its answers, ask again,
# take everything down. Exit code 0 only if every answer was whole and the same each time.
#
#   MODELS_DIR=folder MODEL=/models/NAME ADAPTERS_DIR=folder deploy/smoke.sh
#
# Without variables: the quickstart model, fetched into ./models, and the example adapters.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${MODEL:-}" ]; then
  fetched=$(.venv/bin/python -c 'from pathlib import Path
from lorafleet.quickstart import fetch_quickstart_model
print(fetch_quickstart_model(Path("models")).name)')
  export MODELS_DIR=./models MODEL=/models/$fetched
fi
scratch=$(mktemp -d)
cp -r "${ADAPTERS_DIR:-examples/adapters}" "$scratch/adapters"
chmod -R a+rX "$scratch" # PEFT's files are their owner's alone, and the containers are somebody else
# In float32, so that an answer depends neither on the batch it was in nor on who finished it.
export ADAPTERS_DIR=$scratch/adapters PORT=${PORT:-18000} THREADS=${THREADS:-1} DTYPE=float32
export COMPOSE_PROJECT_NAME=lorafleet-smoke
url=http://127.0.0.1:$PORT

say() { printf '== %s\n' "$*"; }
finish() {
  local code=$?
  if [ $code != 0 ]; then docker compose logs --tail 40 >&2; fi
  say 'taking it down'
  docker compose down --volumes --timeout 45 --remove-orphans
  rm -rf "$scratch"
  exit $code
}
trap finish EXIT

# busy: how many workers hold requests right now, by the streams of work on the queue
busy() {
  docker compose exec -T queue sh -c 'for key in $(valkey-cli --raw keys "lf:{0}:w:*:in"); do valkey-cli --raw xlen "$key"; done' |
    awk '$1 > 0' | wc -l
}
wait_busy() { # wait_busy NUM PID: until that many workers hold requests of the process PID
  while [ "$(busy)" -lt "$1" ]; do
    kill -0 "$2" 2>/dev/null || { say "the answers came before $1 workers had work" >&2; return 1; }
  done
}

say 'starting two workers'
docker compose up --detach --build --wait --scale gpu_worker=2

say 'asking through both'
python3 deploy/ask.py "$url" 6 48 >"$scratch/first.json" &
asking=$!
wait_busy 2 $asking
wait $asking

say 'asking again, and killing a worker in the middle'
python3 deploy/ask.py "$url" 6 48 >"$scratch/second.json" &
asking=$!
wait_busy 2 $asking
docker kill "$(docker compose ps --quiet gpu_worker | head -n 1)" >/dev/null
wait $asking
cmp "$scratch/first.json" "$scratch/second.json"

say 'asking the one that is left'
[ "$(docker compose ps --quiet --status running gpu_worker | wc -l)" = 1 ]
python3 deploy/ask.py "$url" 1 48 >"$scratch/third.json"

say "all answers whole, $(grep -c : "$scratch/first.json") of them twice the same"
