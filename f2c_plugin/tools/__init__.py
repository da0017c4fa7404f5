"""Commands around a training: reports, memory plans, packs, checkpoints, diagnosis."""
