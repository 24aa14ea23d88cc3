"""What a cache holds: entries, leases and the ledger of their bytes."""
