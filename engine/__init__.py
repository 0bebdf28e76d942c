"""One model on one device in one thread."""
