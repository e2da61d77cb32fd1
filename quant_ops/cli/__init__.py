"""The `fewbits` command."""
