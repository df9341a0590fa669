"""`python -m bench [NAME ...]`: runs the named benchmarks, or all that need no accelerator."""

from __future__ import annotations

import importlib
import sys

from bench.figures import provenance, show

BENCHMARKS = {
    "kv_stream": "KV stream, numpy to numpy between two processes: gRPC against plain sockets, 1 MiB blocks",
    "serving": "the whole stack on this machine with the demo model",
    "decode_cpu": "a decode step on the CPU: 16 streams of the demo model, the whole engine against transformers",
    "step_jitter": "a decode step while the KV of other requests arrives at full speed",
    "pipeline": "KV transfer that a prompt waits for, over a link of limited rate, in units of its computation T_c",
    "prefill": "prefill through the service against the same emulation called in process",
    "codecs": "codecs on the CPU against a torch copy of the same output",
}


def main(names: list[str]) -> int:
    """Runs benchmarks; returns the exit status."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark named {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    print(provenance())
    for name in names or BENCHMARKS:
        module = importlib.import_module(f"bench.{name}")
        show(BENCHMARKS[name], module.run())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
