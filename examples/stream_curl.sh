#!/usr/bin/env bash
# Stream an answer with curl: `make serve`, then examples/stream_curl.sh "Why is the sky blue?"
set -euo pipefail

url=${BATON_URL:-http://127.0.0.1:8000}
question=${1:-Tell me about the sea.}
body=$(printf '%s' "$question" | python3 -c '
import json, sys
message = {"role": "user", "content": sys.stdin.read()}
print(json.dumps({"messages": [message], "max_tokens": 64, "stream": True}))')

# --no-buffer shows each event as it comes; --fail-with-body makes an HTTP error an error here.
curl --no-buffer --silent --show-error --fail-with-body "$url/v1/chat/completions" \
  -H 'Content-Type: application/json' -d "$body"
