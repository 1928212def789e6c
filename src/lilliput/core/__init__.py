"""What everything else stands on: trees of tensors, keyed randomness, names, accounts, and the contract of a method."""
