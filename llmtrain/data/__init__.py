"""Text to batches: corpus → tokenizer → shards → order → batches."""
