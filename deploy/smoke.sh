#!/usr/bin/env bash
# Try the images as users do. First as a newcomer: `docker compose up` in a fresh clone of what is committed here, with no
# variable set and nothing prepared; ask the base and the three example adapters, take it down. Then start a fleet with
# two workers, ask through both, kill one in the middle of its answers, and ask again. Exit code 0 only if every answer
# was whole, and the same each time.
#
#   MODELS_DIR=folder MODEL=/models/NAME ADAPTERS_DIR=folder deploy/smoke.sh
#
# The variables are for the second fleet. Without them it serves what the first one did.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
# A name of its own, so that a fleet that runs here is left alone.
export COMPOSE_PROJECT_NAME=lorafleet-smoke

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

# ask URL NUM_PER_MODEL FOLDER: the base and the adapters in FOLDER, all of which must be served
ask() {
  local names
  names=$(cd "$3" && dirname */adapter_config.json)
  # shellcheck disable=SC2086
  python3 deploy/ask.py "$1" "$2" 48 $names
}
# busy: how many workers hold requests right now, by the streams of work on the queue
busy() {
  printf '%s\n' "$operator" | docker compose exec -T queue sh -c '
    read -r REDISCLI_AUTH; export REDISCLI_AUTH
    for wid in $(valkey-cli --user operator --raw zrangebyscore lf:workers -inf +inf); do
      valkey-cli --user operator --raw xlen "lf:{0}:w:$wid:in"
    done' | awk '$1 > 0' | wc -l
}
# refused SERVICE CODE: whether what a service must not be able to do fails
refused() {
  if docker compose exec -T "$1" python -c "$2" 2>/dev/null; then say "$1 could: $2" >&2; return 1; fi
}
wait_busy() { # wait_busy NUM PID: until that many workers hold requests of the process PID
  while [ "$(busy)" -lt "$1" ]; do
    kill -0 "$2" 2>/dev/null || { say "the answers came before $1 workers had work" >&2; return 1; }
  done
}

say 'a fresh clone, no variable set'
git clone --quiet . "$scratch/clone"
(
  cd "$scratch/clone"
  # shellcheck disable=SC2046
  unset $(sed -n 's/^\([A-Z_]*\)=.*/\1/p' .env.example)
  docker compose up --detach --build --wait
  ask http://127.0.0.1:8000 1 examples/adapters >"$scratch/fresh.json"
  [ "$(grep -c : "$scratch/fresh.json")" = 4 ]
  docker compose down --timeout 45 # the volumes stay: the next start finds the model there
)

cp -r "${ADAPTERS_DIR:-examples/adapters}" "$scratch/adapters"
chmod -R a+rX "$scratch" # PEFT's files are their owner's alone, and the containers are somebody else
# In float32, so that an answer depends neither on the batch it was in nor on who finished it.
export ADAPTERS_DIR=$scratch/adapters PORT=${PORT:-18000} THREADS=${THREADS:-1} DTYPE=float32
url=http://127.0.0.1:$PORT

say 'starting two workers'
docker compose up --detach --build --wait --scale gpu_worker=2

operator=$(docker compose run --rm --no-deps -T --entrypoint cat cli /queue-user/password)

say 'nobody is where they need not be'
store='import socket; socket.create_connection(("adapter_store", 9000), 3)'
outside='import socket; socket.create_connection(("pypi.org", 443), 3)'
docker compose exec -T gateway python -c "$store" # so the next ones are refused, and not broken
refused scheduler "$store"
for service in gateway scheduler gpu_worker; do refused $service "$outside"; done
refused gateway 'import redis; redis.Redis.from_url("redis://queue:6379/0").ping()'
[ "$(docker compose ps --format '{{.Ports}}' | grep -c -e '->')" = 1 ] # only the gateway has a port of this machine
docker compose run --rm -T cli keys create --tenant smoke >/dev/null

say 'asking through both'
ask "$url" 6 "$ADAPTERS_DIR" >"$scratch/first.json" &
asking=$!
wait_busy 2 $asking
wait $asking

say 'asking again, and killing a worker in the middle'
ask "$url" 6 "$ADAPTERS_DIR" >"$scratch/second.json" &
asking=$!
wait_busy 2 $asking
docker kill "$(docker compose ps --quiet gpu_worker | head -n 1)" >/dev/null
wait $asking
cmp "$scratch/first.json" "$scratch/second.json"

say 'asking the one that is left'
[ "$(docker compose ps --quiet --status running gpu_worker | wc -l)" = 1 ]
ask "$url" 1 "$ADAPTERS_DIR" >"$scratch/third.json"

say "all answers whole, $(grep -c : "$scratch/first.json") of them twice the same"
