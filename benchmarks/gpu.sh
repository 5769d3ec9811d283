#!/usr/bin/env bash
# What needs a GPU, in a few minutes: the table of gpu.py, then the smoke profile on CUDA, chapter by
# chapter. No package index is needed; PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" SSAH_DEVICE=cuda
failed=0

(cd benchmarks && "$python" gpu.py) || failed=1
for chapter in nbs/0*.ipynb; do
    name=$(basename "$chapter" .ipynb)
    started=$SECONDS
    if "$python" workflow/run_chapter.py smoke "$name" 8 >"/tmp/gpu_$name.log" 2>&1; then
        echo "smoke on CUDA: $name ran in $((SECONDS - started)) s"
    else
        echo "smoke on CUDA: $name failed"
        tail -n 15 "/tmp/gpu_$name.log"
        failed=1
    fi
done
exit $failed
