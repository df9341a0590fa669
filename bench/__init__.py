"""Benchmarks: `make bench` runs all that need no accelerator, as ratios against references of the same run."""
