"""Checkpoint directories without torch: where a model lies, what it is, and whether two processes hold the same one."""

from hma_serve.checkpoint.arguments import add_model_arguments
from hma_serve.checkpoint.fingerprint import fingerprint
from hma_serve.checkpoint.locate import DEMO, model_name, resolve_checkpoint
from hma_serve.checkpoint.random_checkpoint import read_random_seed
from hma_serve.checkpoint.read_config import read_eos_token_ids, read_model_config
from hma_serve.checkpoint.stored_tensors import StoredTensor, read_stored_tensors

__all__ = [
    "DEMO",
    "StoredTensor",
    "add_model_arguments",
    "fingerprint",
    "model_name",
    "read_eos_token_ids",
    "read_model_config",
    "read_random_seed",
    "read_stored_tensors",
    "resolve_checkpoint",
]
