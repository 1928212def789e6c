"""The foundation: trees of tensors, keyed randomness, names, the meter and the ledger, and a method's contract."""
