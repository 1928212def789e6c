"""The device's and the server's end of split learning, shared by all split methods."""
