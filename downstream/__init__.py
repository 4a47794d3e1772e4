"""Transfer protocols: what a pre-trained encoder is worth."""
