"""Settings every test shares: one thread, so that tiny models do not fight over two cores."""

import torch

torch.set_num_threads(1)
