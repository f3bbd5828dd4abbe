from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the tests run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so do the processes they start
settings.register_profile(
    "vrm", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("vrm")
