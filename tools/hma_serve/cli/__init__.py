"""The `hma-serve` command."""
