import os
import threading

# The tests' models are small: on two free cores two threads took 1.2 times as long as one, on busy
# ones 3 times.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch.compile otherwise compiles three programs to see what this CPU can do, 15 CPU seconds.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import engine  # noqa: F401  before torch: it sets how threads wait

from tqdm import tqdm

# A forked process that a test kills would take the lock with it that tqdm's processes share.
tqdm.set_lock(threading.RLock())
