#!/usr/bin/env bash
# Builds, tests, checks and measures everything on a machine with an NVIDIA card; docs/gpu.md says more.
#
#   bench/gpu.sh FOLDER [machine|build|test|sanitize|ops|layer|engine|suite|peers|choices ...]
#
# Without stages: all of them. Each stage's log, exit status and results go to FOLDER, and everything together to
# FOLDER.tar.gz. A stage that fails does not stop the others; the exit status is 1 where one failed, 2 for bad input.
# Nothing is fetched from a network. PYTHON chooses the interpreter (python3), COMMIT names the commit where the folder
# is no git checkout.
set -uo pipefail

stages=(machine build test sanitize ops layer engine suite peers choices)
usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

[ $# -ge 1 ] && [[ $1 != -* ]] || usage
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
for name in "$@"; do
  case " ${stages[*]} " in *" $name "*) ;; *) echo "unknown stage: $name" >&2; usage ;; esac
done
[ $# -eq 0 ] || stages=("$@")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
commit=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
export PYTHONUNBUFFERED=1 CUDA_MODULE_LOADING=LAZY

# What there is to measure on; fails where there is no card to use.
machine() {
  date -u '+%F %T UTC'; echo "commit $commit"; uname -srm; nproc
  local asked=name,driver_version,compute_cap,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit
  nvidia-smi && nvidia-smi --query-gpu=$asked --format=csv || return 1
  nvcc --version | tail -2
  "$python" - <<'END'
import importlib.metadata as metadata, sys
import torch
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda,
      "cuDNN", torch.backends.cudnn.version())
for name in ("triton", "numpy", "cupy-cuda13x", "flash-attn", "pybind11", "ninja", "setuptools", "pytest"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
sys.exit(0 if torch.cuda.is_available() else "torch sees no CUDA device")
END
}

# The native module with CUDA kernels, into this tree, in at most six minutes.
build() {
  DSA_RT_CUDA=ON timeout -k 10 360 "$python" -m pip install --no-build-isolation --no-deps --no-index -v -e . || {
    local status=$?; [ $status -eq 124 ] && echo "the build took more than six minutes"; return $status; }
  "$python" -c 'from dsa_rt import _native as n; i = n.build_info(); print(i); assert i["cuda"], "built without CUDA"'
}

# All tests that need a card, of the files that have such a test: others may import what this machine lacks.
test_gpu() {
  local files
  mapfile -t files < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py' | sort)
  [ ${#files[@]} -gt 0 ] || { echo "no test file has the marker gpu"; return 1; }
  timeout -k 10 1500 "$python" -m pytest -m gpu --junitxml="$out/tests.xml" "${files[@]}" || return
  "$python" - "$out/tests.xml" <<'END'
import sys
import xml.etree.ElementTree as xml
(suite,) = xml.parse(sys.argv[1]).getroot().iter("testsuite")
count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
print(count)
sys.exit(0 if count["tests"] > count["skipped"] else "every test was skipped")
END
}

# compute-sanitizer: a tool that is missing or prints no summary is a failure, not a pass.
sanitize() {
  local tool failed=0 log summary
  command -v compute-sanitizer || { echo "compute-sanitizer is not installed"; return 1; }
  "$python" -m bench.gpu.sanitize || return  # without it first: compiles what is compiled at first use
  for tool in memcheck racecheck initcheck synccheck; do
    log="$out/sanitize-$tool.log"
    echo "== $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 900 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 "$python" -m bench.gpu.sanitize > "$log" 2>&1
    local status=$?
    summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1)
    tail -3 "$log"
    if [ $status -ne 0 ]; then echo "$tool: exit status $status"; failed=1
    elif ! grep -qE 'ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards' <<< "$summary"; then
      echo "$tool: no clean summary${summary:+: $summary}"; failed=1
    elif ! grep -qE '^sanitize: [1-9][0-9]* calls ran' "$log"; then echo "$tool: the ops did not run"; failed=1
    fi
  done
  return $failed
}

# The cache of a whole clip, and of one chunk of three latent frames.
ops() { timeout -k 10 1500 "$python" -m bench.gpu.ops --cached 32760 4680 --out "$out" --commit "$commit"; }
layer() { timeout -k 10 600 "$python" -m bench.gpu.layer --out "$out" --commit "$commit" --active 1408 4680 8190; }
engine() { timeout -k 10 300 "$python" -m bench.engine --device cuda --dtype bf16 --out "$out" --quiet; }
suite() { timeout -k 10 1500 "$python" -m dsa_rt.cli bench --device cuda --out "$out"; }
peers() {
  timeout -k 10 1500 "$python" -m bench.peers --device cuda --dtype bf16 --size wan2.1-t2v-1.3b --height 480 \
    --width 832 --frames 81 --rounds 5 --out "$out" --quiet
}
# The table that the times of stage ops make; the one of the tree stays as it is.
choices() { "$python" -m bench.choices "$out/gpu-ops.json" --out "$out/choices.json"; }

failed=0
: > "$out/summary.txt"
say() { echo "$*" | tee -a "$out/summary.txt"; }
card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1)
say "dsa_rt on ${card:-a machine without nvidia-smi}, commit $commit"
for name in "${stages[@]}"; do
  echo "== $name (log: $out/$name.log)"
  begun=$SECONDS
  run=$name; [ "$name" = test ] && run=test_gpu
  "$run" > "$out/$name.log" 2>&1 < /dev/null
  status=$?
  if [ $status -eq 0 ]; then verdict=passed; else verdict="FAILED with $status"; failed=1; tail -25 "$out/$name.log"; fi
  say "$(printf '%-9s %s, %d s' "$name" "$verdict" $((SECONDS - begun)))"
done
said='^\||^copy |^WRONG|^MISSED|^not measured|^(- )?not run|^[+-] [a-z_]+ on |^left out|^nothing changes'
for table in ops layer suite peers choices; do
  [ -f "$out/$table.log" ] && { echo; grep -E "$said" "$out/$table.log"; }
done
echo
cat "$out/summary.txt"
tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")" && echo "everything is in $out.tar.gz"
exit $failed
