"""Arrays: what may be done to one array of a framework, the adapters that do it, and which adapter serves a value."""
