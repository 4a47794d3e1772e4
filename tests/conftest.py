import os

# The tests' models are small: on two free cores two threads took 1.2 times as long as one, on busy
# ones 3 times.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import engine  # noqa: F401  before torch: it sets how threads wait
