"""What lies in a directory or at a URL: folders of whole files, checkpoints."""
