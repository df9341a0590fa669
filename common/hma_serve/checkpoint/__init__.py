"""Checkpoint directories without torch: where a model lies, what it is, and whether two processes hold the same one."""

from hma_serve.checkpoint.fingerprint import fingerprint
from hma_serve.checkpoint.locate import DEMO, resolve_checkpoint
from hma_serve.checkpoint.read_config import read_eos_token_ids, read_model_config
from hma_serve.checkpoint.stored_tensors import StoredTensor, read_stored_tensors

__all__ = [
    "DEMO",
    "StoredTensor",
    "fingerprint",
    "read_eos_token_ids",
    "read_model_config",
    "read_stored_tensors",
    "resolve_checkpoint",
]
