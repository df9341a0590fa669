#!/usr/bin/env bash
# Everything that needs a GPU machine, in the order of what is worth most, each part within its limit of time.
#   bench/gpu_day.sh [PART ...]; parts, all by default:
#   tests kernels products whole_path prefill attention decode beside ablation ablation_14b ablation_32b
# Each writes into a folder of its name in $OUT (default: gpu_results). Nothing needs to be installed but the packages that
# the services import: the roots of the source are on the path. $COMMIT names the commit where there is no git, $PYTHON
# the interpreter. A part that fails or runs out of time does not end the others; the exit status says whether one did.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu_results}
for root in tools services/decode services/prefill services/router common .; do
  PYTHONPATH=$PWD/$root${PYTHONPATH:+:$PYTHONPATH}
done
export PYTHONPATH
python=${PYTHON:-python3}
failed=0

part() { # part NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  echo "== $name, at most $seconds s: $*"
  local began=$SECONDS
  mkdir -p "$out/$name"
  OUT="$out/$name" timeout --signal INT --kill-after 20 "$seconds" "$@" > >(tee "$out/$name/output.log") 2>&1 || { echo "== $name FAILED ($?)"; failed=1; }
  echo "== $name took $((SECONDS - began)) s"
}

ablation() { # ablation NAME SHAPE...
  local name=$1
  shift
  part "$name" 560 "$python" -m bench.ablation --device cuda --decode-device cuda --profile fp8_e4m3 --tokens 4096 \
    --mbit 8000 --model "$@" --write "$out/$name"
}

for each in "${@:-tests kernels products whole_path prefill attention decode beside ablation ablation_14b ablation_32b}"; do
  for name in $each; do
    case $name in
      # Prefill's kernels, without pytest.
      tests) part tests 300 "$python" tests/support/prefill_kernel_checks.py ;;
      # All GPU tests (they need pytest and its plugins), then extends. Six minutes or more.
      kernels) part kernels 590 "$python" -m bench.decode --seconds 500 8B-extend extend ;;
      # By the package's kernels and by the library, alone and in steps. A minute or two.
      products) part products 400 "$python" -m bench.decode --no-check --seconds 300 products ;;
      # About four minutes, of which one goes to starting three workers.
      whole_path) part whole_path 560 "$python" -m bench.whole_path --device cuda ;;
      prefill) part prefill 400 "$python" -m bench.prefill_gpu 8B ;;
      # A minute or two each.
      attention) part attention 580 "$python" -m bench.decode --no-check --seconds 500 attention codecs ;;
      decode) part decode 580 "$python" -m bench.decode --no-check --seconds 500 8B 4B 14B 32B ;;
      beside) part beside 580 "$python" -m bench.decode --no-check --seconds 500 beside ;;
      ablation) ablation ablation random:qwen3-4b random:qwen3-8b ;;
      ablation_14b) ablation ablation_14b random:qwen3-14b ;;
      ablation_32b) ablation ablation_32b random:qwen3-32b ;;
      *) echo "no part named $name" >&2; exit 2 ;;
    esac
  done
done
exit $failed
