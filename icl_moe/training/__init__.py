"""Training on the DeepSpeed engine."""

import os
import warnings

import torch

if not torch.cuda.is_available():
    # Said outright, before deepspeed is imported, lest every rank warn that it found no
    # accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed's own calls; nothing that a user could change.
warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated")
