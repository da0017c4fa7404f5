"""What the command line does around a training."""
