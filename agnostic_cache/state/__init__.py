"""What a state is, whoever computed it: leaves, roles, structure, ownership, and the adapters of arrays."""
