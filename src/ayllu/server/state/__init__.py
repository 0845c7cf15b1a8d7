"""What the server remembers: users, keys, sessions, conversations, runs, files, settings, an audit log."""
