"""Item text -> embeddings -> residual quantisation -> semantic IDs, and the trie of legal IDs."""
