"""What a model makes of a batch: logits, candidate scores, generated text, the linear probe."""
