#!/usr/bin/env bash
# Pretraining on several machines under Slurm: sbatch runs/slurm.sh --model 1B --shard
# One torchrun a machine; they find each other at the first machine. The repository, the data and --out must be on a
# file system that all machines share. A job that is requeued goes on from its last checkpoint by itself.
#SBATCH --job-name=baby-llama2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?请用 sbatch 提交}"
[ -e .venv/bin/activate ] && source .venv/bin/activate

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=8

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$head_node:$port" \
    pretrain.py --resume "$@"
