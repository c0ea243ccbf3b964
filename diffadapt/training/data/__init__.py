"""The pictures and captions of a training run: found, checked, shaped, drawn in a random order, and reported."""
