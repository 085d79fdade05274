#!/bin/bash
# A training on SLURM: sbatch slurm.sh [KEY=VALUE ...], from a directory that all nodes see.
#
# Five minutes before the time is over SLURM sends USR1; the driver saves, ends with 75, and the job is queued again
# under the same number. run_id is made of that number, so the next start continues the run.
#SBATCH --job-name=holdfast
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

ROOT=${HOLDFAST_HOME:?set HOLDFAST_HOME to a directory that all nodes share}
PROJECT=holdfast
RUN_ID=slurm-$SLURM_JOB_ID
RUN=$ROOT/$PROJECT/$RUN_ID
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)  # this script runs there, and so does the driver

export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}  # Ray's own are 30 s
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}  # srun passes it on to all nodes

# The driver's process number is in its lock. `ray symmetric-run` would die of a USR1, so it is not asked to pass it on.
forward() {
  pid=$(sed -n 's/.*"pid": *\([0-9][0-9]*\).*/\1/p' "$RUN/driver.lock" 2>/dev/null)
  echo "slurm.sh: time is nearly over; telling the driver (${pid:-not there yet})"
  [ -n "$pid" ] && kill -USR1 "$pid"
}
trap forward USR1

srun --kill-on-bad-exit=0 ray symmetric-run --address "$HEAD:6379" --min-nodes "$SLURM_NNODES" -- \
  holdfast train "root=$ROOT" "project=$PROJECT" "run_id=$RUN_ID" launch.address=auto \
  "launch.nodes=$SLURM_NNODES" launch.workers_per_node=8 launch.gpus_per_worker=1 launch.spares=0 \
  trainer.global_batch=256 trainer.micro_batch=2 trainer.eval_windows=64 \
  snapshot.memory_limit_gb=64 snapshot.persist_every_s=600 "$@" &
srun_pid=$!
wait "$srun_pid"
code=$?
while kill -0 "$srun_pid" 2>/dev/null; do  # a signal ends the wait, not what is waited for
  wait "$srun_pid"
  code=$?
done

# `ray symmetric-run` ends with 0 when Ray did not start: only run.json knows how it went.
noted=$(python3 - "$RUN/run.json" <<'PYTHON'
import json, sys
try:
    ended = json.load(open(sys.argv[1]))["attempts"][-1]["ended"]
except (OSError, ValueError, LookupError):
    ended = None
print(1 if ended is None else ended["exit_code"])
PYTHON
)
[ "$code" -eq 0 ] && code=$noted
echo "slurm.sh: srun and run.json say $code"
if [ "$code" -eq 75 ] || [ "$code" -eq 143 ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
