"""Both ends of split learning, which all split methods share."""
