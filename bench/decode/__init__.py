"""The GPU decode path: `python -m bench.decode` on a GPU machine checks it, then times it, and writes what it found."""
