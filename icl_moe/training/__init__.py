"""Training on the DeepSpeed engine."""

import os
import warnings

import torch

if not torch.cuda.is_available():
    # Set before deepspeed is imported, so that not every rank warns that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# From DeepSpeed's own calls; the user cannot change them.
warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated")
