"""The commands of `torchord`, and what they share: options, exit codes, one line for what goes wrong."""
