"""Other engines beside ours: how each is started, watched and ended."""
