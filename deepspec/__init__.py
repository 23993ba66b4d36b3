"""deepspec: train and evaluate draft models for speculative decoding."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is one line of ours, not a page of torch's frames

__version__ = "0.1.0"
