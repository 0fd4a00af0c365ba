"""Networks that a study can name, and their weights as one flat vector."""
