"""From text to batches: tokenizer, corpus, prepared files, and the loader that training reads."""
