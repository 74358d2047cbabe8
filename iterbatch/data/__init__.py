"""Text in: corpora and their forms, documents, token blocks, batches, evaluation windows."""
