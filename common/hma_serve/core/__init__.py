"""The shared nouns and the error table: pure values, no I/O."""
