"""Text -> MDS shards. Imports no other room."""
