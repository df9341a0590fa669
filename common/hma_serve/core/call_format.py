"""How a model writes the calls that it makes of tools.

Qwen3's chat template asks for each call in the form of the Hermes models, a JSON object between two marks, and puts a
newline before one that follows something:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Before anything else an answer may have thoughts, in which a model may weigh a call that it then does not make.
"""

OPENING, CLOSING = "<tool_call>", "</tool_call>"
SEPARATOR = "\n"
THOUGHTS, THOUGHTS_END = "<think>", "</think>"
