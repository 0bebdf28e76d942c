"""What all processes agree on: ids, parameters, events and errors. Standard library only."""
