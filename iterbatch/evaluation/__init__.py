"""What an adapter is worth: perplexity, the text it writes, what it has memorised."""
