#!/usr/bin/env bash
# What a GPU must show, on one card and in under 25 minutes:
#
#     bash benchmarks/gpu.sh
#
# It writes a page of results to paste, runs/gpu-<card>.md. Exit code 1 if anything failed or ran
# out of its time.
set -uo pipefail
cd "$(dirname "$0")/.."

card=$(python -c 'import torch; print(torch.cuda.get_device_name())') || exit 1
mkdir -p runs
page="runs/gpu-${card// /-}.md"
errors=$(mktemp)
failed=0

# section SECONDS TITLE COMMAND...: what the command prints, its time and its exit code.
section() {
    local limit=$1 title=$2 start=$SECONDS code
    shift 2
    printf '\n## %s\n\n`%s`\n\n```\n' "$title" "$*" | tee -a "$page"
    timeout "$limit" "$@" 2> "$errors" | tee -a "$page"
    code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        failed=1
        tail -n 40 "$errors" | tee -a "$page"
    fi
    printf '```\n\n%d s, exit code %d\n' $((SECONDS - start)) "$code" | tee -a "$page"
}

{
    printf '# %s\n\n%s, commit %s\n\n' "$card" "$(date -u +%F)" "$(git rev-parse --short HEAD)"
    python -c 'import torch; print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")'
    nvidia-smi --query-gpu=driver_version,memory.total --format=csv,noheader
} | tee "$page"

section 420 'The same numbers' python -m pytest -q --tb=short tests/test_cuda.py

for size in 2b 7b; do
    section 270 "A step in four ways, $size" python benchmarks/grpo_step.py --device cuda \
        --size $size --shapes 933:8:256 --repetitions 1 --gradient_checkpointing
done

memory="python benchmarks/memory.py --gpus 1 --measure"
section 150 'Memory, 2b' $memory --size 2b
section 150 'Memory, 2b, offloaded' $memory --size 2b --offload_optimizer
# 7B's weights, moments and gradients are 124 GiB of the host's memory.
if [ "$(awk '/MemAvailable/ {print int($2 / 2^20)}' /proc/meminfo)" -ge 150 ]; then
    section 210 'Memory, 7b, offloaded' $memory --size 7b --offload_optimizer
fi

printf '\n%s holds the results.\n' "$page"
rm -f "$errors"
exit $failed
