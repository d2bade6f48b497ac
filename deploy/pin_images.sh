#!/usr/bin/env bash
# Write the outside images into .env with the digests that their tags have in the registry now, so that every build and
# start uses the same bytes until this is run again. `make pin-images`
set -euo pipefail
cd "$(dirname "$0")/.."

touch .env
for variable in PYTHON_IMAGE QUEUE_IMAGE PROMETHEUS_IMAGE JAEGER_IMAGE GRAFANA_IMAGE S3_IMAGE; do
  image=$(sed -n "s/^$variable=//p" .env.example)
  digest=$(docker buildx imagetools inspect "$image" | awk '/^Digest:/ { print $2; exit }')
  [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || { echo "$image: the registry gave no digest: '$digest'" >&2; exit 1; }
  { grep -v "^$variable=" .env || true; echo "$variable=$image@$digest"; } >.env.part
  mv .env.part .env
  echo "$image@$digest"
done
