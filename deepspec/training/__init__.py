"""Training of a draft on DeepSpeed."""

import os

import torch

if not torch.cuda.is_available():  # before deepspeed is imported: it would guess, and warn about its guess
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
