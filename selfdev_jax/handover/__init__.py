"""What one does with a run: repeat a score, hand on a model."""
