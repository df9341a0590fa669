"""Prefill: computes the KV of whole 32-token groups in low precision and pushes it to decode layer by layer.

A *front* (gRPC, transfers, registration) and an *engine* process (weights, scheduling, attention) share memory slots:
the engine fills a slot with one layer of one chunk, the front sends it while the engine computes the next layer.
Nothing here samples or loads an output head: every token a client sees comes from decode's weights.
"""
