"""One thread of arithmetic a process: tests start many processes, and threads that wait for each other's core cost
minutes on a small machine. Set before torch is imported anywhere; processes that tests start inherit it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
