"""For what runs on the stand-in: cuDNN's host side is not in it, so attention takes the next kernel, flash."""

import torch

torch.backends.cuda.enable_cudnn_sdp(False)
