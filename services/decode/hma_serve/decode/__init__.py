"""The decode worker: holds prompts' KV as it was packed, computes and samples every token.

Two processes. The *front* (`main`) speaks gRPC, validates and checks sums; the *engine* (`engine_main`) owns tickets
and pages and runs steps. Neither waits for the other: small messages go over a socket, KV bytes through shared memory.
"""
