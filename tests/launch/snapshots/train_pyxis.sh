#!/usr/bin/env bash
#SBATCH --job-name=distil
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:h100:8
#SBATCH --time=1-0
#SBATCH --qos=high
#SBATCH --signal=B:USR1@600
#SBATCH --chdir=/here
#SBATCH --output=/here/run/slurm/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --reservation=weekend
#SBATCH '--comment=two words'
#
# Written by taopd VERSION. One task a node starts torchrun, and that a rank a GPU.
# Before the time limit, and when the job is pre-empted, training writes a checkpoint and stops, and the job queues again.

set -uo pipefail

job_dir=/here/run/slurm
attempt=${SLURM_RESTART_COUNT:-0}
max_requeues=5
log=$job_dir/$SLURM_JOB_ID.attempt-$attempt.log
run_again=$job_dir/$SLURM_JOB_ID.run-again

say() {
  printf '%(%F %T)T taopd job %s, attempt %s: %s\n' -1 "$SLURM_JOB_ID" "$attempt" "$*"
}

checkpointed_iteration() {
  cat -- /here/run/checkpoints/latest_checkpointed_iteration.txt 2>/dev/null
}

# The controller of a busy cluster does not always answer at once.
patiently() {
  local pause
  for pause in 2 10 30; do
    "$@" && return
    sleep "$pause"
  done
  "$@"
}

# Ends this script with the ranks' status, or with 75 where they stopped as asked and somebody has to start them again.
queue_again() {
  local state
  state=$(patiently squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
  if [[ -z $state ]]; then
    say "$1; not queued again: squeue does not tell how this job stands; submit it anew to go on"
  elif [[ $state != RUNNING ]]; then
    say "$1; SLURM ends this job ($state), and queues it again if it was pre-empted"
    exit "$status"
  elif ((attempt >= max_requeues)); then
    say "$1; not queued again: --max-requeues is $max_requeues"
  else
    say "$1; queued again"
    patiently scontrol requeue "$SLURM_JOB_ID" && exit 0
    say "scontrol did not queue it again; submit it anew to go on"
  fi
  exit $((status == 0 ? 75 : status))
}

if ((attempt > max_requeues)); then
  say "this job started again $attempt times and --max-requeues is $max_requeues; submit it anew to go on"
  exit 75
fi
rm -f -- "$run_again" "$run_again.refused"

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts[0]}
MASTER_PORT=$((20000 + (SLURM_JOB_ID + attempt) % 10000))

step=(
  srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1
  --output="${log//%/%%}"
  '--container-image=nvcr.io#nvidia/pytorch:25.10-py3'
  '--container-mounts=/here:/here,/data:/data,/models:/models:ro'
  --container-workdir=/here
  --no-container-mount-home
  --mpi=none
)
ranks=(
  env
  CUDA_DEVICE_MAX_CONNECTIONS=32
  NCCL_DEBUG=WARN
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  OMP_NUM_THREADS=1
  TOKENIZERS_PARALLELISM=false
  HF_HUB_OFFLINE=1
  PYTHONFAULTHANDLER=1
  'NCCL_IB_HCA=mlx5_0,mlx5_1'
  python3 -m megatron_taopd launch local
  --nnodes 2 --nproc-per-node 8 --max-restarts 1
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --run-id "$SLURM_JOB_ID.$attempt"
  --run-again-file "$run_again"
  --
  train
  --student Qwen3-4B
  --teacher Qwen3-32B
  --prompt-data 'my prompts.jsonl'
  --global-batch-size 128
  --tensor-model-parallel-size 4
  --sequence-parallel
  --bf16
  --save run/checkpoints
  --load run/checkpoints
  --log-dir run
)
say "log: $log"
say "command:$(printf ' %q' "${step[@]}" "${ranks[@]}")"

before=$(checkpointed_iteration)
srun_pid=
time_is_up=
trap 'say "told to stop: time is nearly up"; time_is_up=yes; kill -USR1 "$srun_pid" 2>/dev/null' USR1
trap 'say "told to stop: pre-empted or cancelled"; kill -USR1 "$srun_pid" 2>/dev/null' TERM

"${step[@]}" "${ranks[@]}" &
srun_pid=$!
# A trap ends `wait` early; srun is done once it is no more.
while true; do
  wait "$srun_pid"
  status=$?
  kill -0 "$srun_pid" 2>/dev/null || break
done
srun_pid=

if ((status == 0)) && [[ -e $run_again ]]; then
  rm -f -- "$run_again"
  after=$(checkpointed_iteration)
  where="at iteration ${after:-0}"
  if [[ -n $time_is_up && -n $after && $after == "$before" ]]; then
    say "stopped $where, as it had started; not queued again: one step takes longer than the job"
    exit 75
  fi
  queue_again "stopped $where"
fi
if ((status != 0 && status != 2)) && [[ ! -e $run_again.refused ]]; then
  rm -f -- "$run_again"
  after=$(checkpointed_iteration)
  if [[ -z $after || $after == "$before" ]]; then
    say "ended with status $status; not queued again: no checkpoint since this start"
    exit "$status"
  fi
  queue_again "ended with status $status, with a checkpoint of iteration $after"
fi
say "ended with status $status$([[ ! -e $run_again.refused ]] || echo ": a rank refused to go on")"
rm -f -- "$run_again" "$run_again.refused"
exit "$status"
