"""Around the training: verification, export, synthetic faces, pictures."""
