#!/usr/bin/env bash
# Register an adapter with a running fleet, ask it, and unload it again, with curl.
#
#     examples/use_adapter.sh NAME SOURCE
#
# SOURCE is org/name on the Hub, s3://bucket/prefix, or local:FOLDER. URL and KEY are read from the environment; with
# API keys, KEY needs the scopes `infer` and `adapters`.
set -euo pipefail

name=$1 source=$2
url=${URL:-http://127.0.0.1:8000}

call() { # METHOD PATH [BODY]: prints the answer; fails, with the answer on standard error, for a status of 400 or more
    curl --silent --show-error --fail-with-body --max-time 120 --request "$1" "$url$2" \
        --header 'Content-Type: application/json' --header "Authorization: Bearer ${KEY:-none}" ${3:+--data "$3"}
    echo
}

echo "register:"
call POST /v1/adapters "{\"name\": \"$name\", \"source\": \"$source\", \"wait_s\": 60}"
echo "ask:"
call POST /v1/chat/completions \
    "{\"model\": \"$name\", \"messages\": [{\"role\": \"user\", \"content\": \"Who are you?\"}], \"max_tokens\": 40}"
echo "list:"
call GET /v1/models
echo "unload:"
call DELETE "/v1/adapters/$name?wait_s=30"
