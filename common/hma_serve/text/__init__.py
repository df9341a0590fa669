"""Text on both sides of the model: tokenizing prompts, and turning token ids back into text as they arrive.

No torch and no I/O beyond reading `tokenizer.json`, so that the router stays light.
"""

from hma_serve.text.detokenizer import IncrementalDetokenizer
from hma_serve.text.stop_strings import StopMatch, StopStringMatcher
from hma_serve.text.tokenizer import Tokenizer
from hma_serve.text.tokenizing_pool import TokenizingPool

__all__ = ["IncrementalDetokenizer", "StopMatch", "StopStringMatcher", "Tokenizer", "TokenizingPool"]
