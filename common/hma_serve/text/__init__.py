"""Text on both sides of the model: tokenizing prompts, and turning token ids back into text as they arrive.

No torch and no I/O beyond reading the checkpoint's text files, so that the router stays light.
"""

from hma_serve.text.chat_template import ChatTemplate, Conversation
from hma_serve.text.detokenizer import IncrementalDetokenizer
from hma_serve.text.stop_strings import StopMatch, StopStringMatcher
from hma_serve.text.tokenizer import Tokenizer
from hma_serve.text.tokenizing_pool import TokenizingPool

__all__ = [
    "ChatTemplate",
    "Conversation",
    "IncrementalDetokenizer",
    "StopMatch",
    "StopStringMatcher",
    "Tokenizer",
    "TokenizingPool",
]
