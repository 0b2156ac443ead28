#!/bin/sh
# Train `tiny` and `base` at the same time on one GPU, for at most MINUTES. Run it again to resume.
# Usage: scripts/train_both.sh IMAGES RUNS MINUTES
set -eu
if [ $# -ne 3 ]; then
    echo "usage: $0 IMAGES RUNS MINUTES" >&2
    exit 2
fi
images=$1 runs=$2 minutes=$3
kp="${KP:-$(dirname "$0")/../.venv/bin/kp}"
mkdir -p "$runs"
for name in tiny base; do
    "$kp" train --config "$name" --images "$images" --out "$runs/$name" \
        --device "${DEVICE:-cuda}" --workers "${WORKERS:-5}" --minutes "$minutes" \
        >> "$runs/$name.log" 2>&1 &
    eval "$name=\$!"
done
status=0
for name in tiny base; do
    eval "child=\$$name"
    wait "$child" || status=1
    echo "$name: $(tail -n 1 "$runs/$name.log")"
done
exit $status
