#!/bin/sh
# Pins the images that are not ours, by digest, in .env beside docker-compose.yml.
#
#   sh deploy/images.sh            asks their registry, with docker buildx, what the tags are today
#   sh deploy/images.sh --check    exit status 1 unless .env names both by digest
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
file=${TORCHORD_ENV:-$here/.env}
status=0
for entry in TORCHORD_PYTHON_IMAGE=python:3.12-slim TORCHORD_STORE_IMAGE=valkey/valkey:9-alpine; do
    name=${entry%%=*}
    if [ "${1:-}" = --check ]; then
        grep -Eq "^$name=[^@ ]+@sha256:[0-9a-f]{64}\$" "$file" 2>/dev/null ||
            { echo "$name is not pinned by digest in $file; run sh deploy/images.sh" >&2; status=1; }
        continue
    fi
    digest=$(docker buildx imagetools inspect "${entry#*=}" --format '{{.Manifest.Digest}}')
    case $digest in
        sha256:*) ;;
        *) echo "no digest of ${entry#*=} was told: $digest" >&2; exit 1 ;;
    esac
    [ ! -e "$file" ] || { grep -v "^$name=" "$file" > "$file.new" || true; cat "$file.new" > "$file"; rm "$file.new"; }
    printf '%s\n' "$entry@$digest" >> "$file"
done
exit "$status"
