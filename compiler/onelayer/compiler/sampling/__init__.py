"""The sampling pass: prompts become pictures of a pipeline whose components stream."""
