"""How good a net is, and how the head is doing: verification, export, model selection, monitoring."""
