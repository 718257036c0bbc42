"""One thread per test process: the machine's cores are shared by pytest-xdist's workers."""

import torch

torch.set_num_threads(1)
