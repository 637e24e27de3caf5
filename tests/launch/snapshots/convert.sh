#!/usr/bin/env bash
#SBATCH --job-name=taopd-convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --mem=64G
#SBATCH --chdir=/here
#SBATCH --output=/here/slurm/%j.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#
# Written by taopd VERSION. One task a node starts torchrun, and that a rank a GPU.

set -uo pipefail

job_dir=/here/slurm
attempt=${SLURM_RESTART_COUNT:-0}
max_requeues=0
log=$job_dir/$SLURM_JOB_ID.attempt-$attempt.log
run_again=$job_dir/$SLURM_JOB_ID.run-again

say() {
  printf '%(%F %T)T taopd job %s, attempt %s: %s\n' -1 "$SLURM_JOB_ID" "$attempt" "$*"
}

if ((attempt > max_requeues)); then
  say "this job started again $attempt times and --max-requeues is $max_requeues; submit it anew to go on"
  exit 75
fi
rm -f -- "$run_again" "$run_again.refused"

step=(
  srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=1
  --output="${log//%/%%}"
)
ranks=(
  env
  CUDA_DEVICE_MAX_CONNECTIONS=1
  NCCL_DEBUG=WARN
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  OMP_NUM_THREADS=1
  TOKENIZERS_PARALLELISM=false
  HF_HUB_OFFLINE=1
  PYTHONFAULTHANDLER=1
  python3 -m megatron_taopd launch local
  --nnodes 1 --nproc-per-node 1 --max-restarts 0
  --run-again-file "$run_again"
  --
  convert
  hf-to-megatron
  --source 'it'"'"'s here'
  --output there
)
say "log: $log"
say "command:$(printf ' %q' "${step[@]}" "${ranks[@]}")"

"${step[@]}" "${ranks[@]}"
status=$?

if ((status == 0)) && [[ -e $run_again ]]; then
  rm -f -- "$run_again"
  say "stopped early; not queued again: taopd convert does not say where it was"
  exit 75
fi
say "ended with status $status$([[ ! -e $run_again.refused ]] || echo ": a rank refused to go on")"
rm -f -- "$run_again" "$run_again.refused"
exit "$status"
