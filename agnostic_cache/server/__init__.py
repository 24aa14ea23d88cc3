"""The cache server: speaks lm:// to LMCache's clients and to ours, keeps a budget, and trusts nothing that comes in."""
