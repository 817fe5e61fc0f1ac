#!/usr/bin/env bash
# Train on several processes of this machine:
#   tools/dist_train.sh PRESET PROCESSES [arguments of train.py ...]
#   flashbias run -- bash tools/dist_train.sh cmt 2 --steps 50
# PORT chooses the port that the processes meet on, PYTHON the interpreter.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,5s/^# \?//p' "$0" >&2
    exit 2
fi
preset=$1 processes=$2
shift 2
exec "${PYTHON:-python3}" -m torch.distributed.run --nproc_per_node "$processes" --master_port "${PORT:-29500}" \
    "$(dirname "$0")/train.py" --preset "$preset" "$@"
